"""Captures a real model's attention on a text: post-RoPE Q, K, V of every layer, and the exact block masses.

Knows the engine's model code. Knows nothing of selectors.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvrelay.models.decoder import Decoder
from kvrelay.models.loading import load_model
from kvrelay.models.rope import inverse_frequencies
from kvrelay.models.tokenizer import Tokenizer
from kvrelay_kernels import BLOCK_SIZE, PagedKV


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedLayer:
    """One layer's attention over a text of n tokens, a multiple of 64, in float32.

    q: ``[n, num_q_heads, head_dim]``; k, v: ``[n, num_kv_heads, head_dim]``; out: like q, dense attention.
    mass: ``[num_kv_heads, n / 64, n / 64]``, exact softmax mass of key block j for query block i, averaged
        over the block's 64 queries and the group's heads. Rows sum to 1.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    mass: Tensor

    def paged(self) -> PagedKV:
        """Keys and values as pages in order."""
        k_pages, v_pages = (
            rows.unflatten(0, (-1, BLOCK_SIZE)).transpose(1, 2).contiguous() for rows in (self.k, self.v)
        )
        return PagedKV(
            k_pages=k_pages,
            v_pages=v_pages,
            block_table=torch.arange(len(k_pages), dtype=torch.int32)[None],
            seq_lens=torch.tensor([len(self.k)], dtype=torch.int32),
        )


def token_ids(model: Path, text: Path, num_tokens: int) -> Tensor:
    """First ``num_tokens`` tokens of a text file; raises ValueError when it is shorter."""
    ids = Tokenizer.from_directory(model).encode(text.read_text(), add_special_tokens=False)
    if len(ids) < num_tokens:
        raise ValueError(f"{text} has {len(ids)} tokens; needed at least {num_tokens}")
    return torch.tensor(ids[:num_tokens])


def load_layers(directory: Path, num_layers: int | None) -> Decoder:
    """The model in float32, or its first ``num_layers`` layers."""
    model = load_model(directory, "cpu", torch.float32, "torch")
    assert isinstance(model, Decoder)
    return model if num_layers is None else replace(model, layers=model.layers[:num_layers])


def rope_frequencies(model: Decoder) -> Tensor:
    """``[head_dim / 2]`` radians per position, float64."""
    inverse, _ = inverse_frequencies(model.spec.rope, model.spec.head_dim)
    return inverse.double()


def capture(model: Decoder, ids: Tensor, visit: Callable[[CapturedLayer], None]) -> None:
    """Run a dense prefill of ``ids [n]`` and hand each layer to ``visit``, in order.

    One layer is alive at a time unless ``visit`` keeps it.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, mass = exact_attention(q, k, v)
        q, k, v = (rows.contiguous() for rows in (q, k, v))
        visit(CapturedLayer(layer=layer, q=q, k=k, v=v, out=out, mass=mass))
        return out

    model.forward(ids, torch.arange(len(ids)), attend)


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Dense causal attention one query block at a time: ``out`` and ``mass`` of ``CapturedLayer``."""
    n, num_q_heads, head_dim = q.shape
    num_kv_heads, blocks = k.shape[1], n // BLOCK_SIZE
    keys, values = k.transpose(0, 1), v.transpose(0, 1)
    mass = torch.zeros(num_kv_heads, blocks, blocks)
    out = torch.empty(q.shape)
    hidden = torch.ones(BLOCK_SIZE, BLOCK_SIZE, dtype=torch.bool).triu(1)
    for block in range(blocks):
        rows, stop = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE), (block + 1) * BLOCK_SIZE
        grouped = q[rows].view(BLOCK_SIZE, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
        logits = grouped @ keys[:, :stop].transpose(1, 2) * head_dim**-0.5
        group = num_q_heads // num_kv_heads
        logits[..., rows].masked_fill_(hidden.repeat(group, 1), -torch.inf)
        weights = logits.softmax(-1)
        mass[:, block, : block + 1] = weights.unflatten(-1, (-1, BLOCK_SIZE)).sum(-1).mean(1)
        attended = (weights @ values[:, :stop]).unflatten(1, (group, BLOCK_SIZE))  # [H, G, 64, d]
        out[rows] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out, mass
