"""Any Hugging Face decoder prefills with these kernels: ``register()``, then ``attn_implementation=NAME``."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from kvrelay_kernels.api.block_sparse_prefill import block_sparse_prefill
from kvrelay_kernels.api.kv_block_stats import kv_block_stats
from kvrelay_kernels.api.paged_prefill import paged_prefill
from kvrelay_kernels.api.select_blocks import select_blocks
from kvrelay_kernels.errors import KernelUnavailable
from kvrelay_kernels.layout import BLOCK_SIZE, PagedKV, num_blocks
from kvrelay_kernels.selection import SelectionConfig

NAME = "kvrelay_sparse"


def register(config: SelectionConfig, *, name: str = NAME, impl: str = "auto") -> str:
    """Register sparse prefill with ``config`` under ``name`` and return the name.

    Chunks that start at a multiple of 64 attend sparsely; others, decode steps among them, attend densely.
    The forward pass raises KernelUnavailable for what these kernels do not compute: sliding windows, soft
    caps, dropout, attention sinks, non-causal layers.
    """

    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        _check_supported(module, options)
        outs = torch.zeros_like(query.transpose(1, 2))
        for sequence in range(query.shape[0]):
            kept = slice(None) if mask is None else mask[sequence].bool()
            rows = slice(None) if mask is None else mask[sequence, -query.shape[2] :].bool()
            q = query[sequence].transpose(0, 1)[rows]
            kv = _paged(key[sequence][:, kept], value[sequence][:, kept])
            outs[sequence, rows] = _prefill(q, kv, config, options.get("scaling"), impl)
        return outs, None

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, flash_attention_mask)
    return name


def _prefill(q: Tensor, kv: PagedKV, config: SelectionConfig, scale: float | None, impl: str) -> Tensor:
    cu_seqlens_q = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
    offset = int(kv.seq_lens[0]) - q.shape[0]
    if q.shape[0] <= 1 or offset % BLOCK_SIZE:
        return paged_prefill(q, kv, cu_seqlens_q, scale=scale, impl=impl)[0]
    stats = kv_block_stats(kv, impl=impl)
    chosen = select_blocks(q, kv, config, cu_seqlens_q=cu_seqlens_q, stats=stats, scale=scale, impl=impl)
    return block_sparse_prefill(q, kv, cu_seqlens_q, chosen, scale=scale, impl=impl)[0]


def _paged(key: Tensor, value: Tensor) -> PagedKV:
    """One sequence's ``[num_kv_heads, tokens, head_dim]`` keys and values as pages in order."""
    pages = num_blocks(key.shape[1])
    missing = pages * BLOCK_SIZE - key.shape[1]
    k_pages, v_pages = (
        torch.nn.functional.pad(t, (0, 0, 0, missing))
        .reshape(t.shape[0], pages, BLOCK_SIZE, t.shape[2])
        .transpose(0, 1)
        for t in (key, value)
    )
    return PagedKV(
        k_pages=k_pages,
        v_pages=v_pages,
        block_table=torch.arange(pages, dtype=torch.int32, device=key.device)[None],
        seq_lens=torch.tensor([key.shape[1]], dtype=torch.int32, device=key.device),
    )


def _check_supported(module: torch.nn.Module, options: dict[str, Any]) -> None:
    refused = [name for name in ("sliding_window", "softcap", "dropout", "s_aux") if options.get(name)]
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        refused.append("is_causal=False")
    if refused:
        raise KernelUnavailable(f"{type(module).__name__} needs {refused}; these kernels do not compute it")
