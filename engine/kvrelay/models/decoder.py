"""A lean decoder-only transformer for inference: the Llama, Mistral, Qwen2 and Qwen3 dense families.

Runs on a flat list of tokens from any number of sequences. Knows nothing about sequences, caches or pages:
the caller's `attend` stores keys and values and attends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import embedding, linear, silu

from kvrelay.models.parameters import parameter_shapes
from kvrelay.models.rope import Rope, rotate
from kvrelay.models.spec import ModelSpec
from kvrelay.models.weights import Weights

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`attend(layer, q, k, v) -> out`: q and out [T, num_q_heads, head_dim], k and v [T, num_kv_heads, head_dim].

q and k are rotated already. All three may be strided views; the scale of the scores is `head_dim ** -0.5`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Weights of one layer; linear weights are [out, in], fused ones stacked along `out`.

    `qk_norm` is [num_q_heads + num_kv_heads, head_dim]: the norm of q once per query head, then that of k.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The weights of a model and its forward pass; holds no state of any request."""

    spec: ModelSpec
    rope: Rope
    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab, hidden]; the embedding itself when tied

    @property
    def impl(self) -> str:
        """What computes: torch."""
        return "torch"

    @property
    def device(self) -> torch.device:
        """Device of every weight."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of every weight, of hidden states, and of q, k and v."""
        return self.embedding.dtype

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend, *, kv_only: bool = False
    ) -> torch.Tensor:
        """Run all layers over int64 `token_ids` [T] at int64 `positions` [T] of their own sequences.

        Returns the hidden states after the last norm, [T, hidden]; none, [0, hidden], with `kv_only`, which
        ends with the last layer's attention. Calls `attend` once per layer, in order.
        """
        hidden = embedding(token_ids, self.embedding)
        tables = self.rope.tables(positions, self.dtype)
        for index, layer in enumerate(self.layers):
            normed = rms_norm(hidden, layer.input_norm, self.spec.rms_norm_eps)
            q, k, v = self._project(layer, normed, tables)
            attended = attend(index, q, k, v).flatten(1)
            if kv_only and index == self.spec.num_layers - 1:
                return hidden[:0]
            hidden = hidden + linear(attended, layer.output, layer.output_bias)
            normed = rms_norm(hidden, layer.mlp_norm, self.spec.rms_norm_eps)
            hidden = hidden + _mlp(layer, normed)
        return rms_norm(hidden, self.norm, self.spec.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [R, vocab] for the rows of `hidden` [R, hidden] that the caller picked."""
        return linear(hidden, self.head).float()

    def _project(
        self, layer: LayerWeights, normed: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, hidden] -> rotated q, rotated k, v, each [T, heads, head_dim]; q and k in one go."""
        num_q, num_kv = self.spec.num_q_heads, self.spec.num_kv_heads
        qkv = linear(normed, layer.qkv, layer.qkv_bias).view(-1, num_q + 2 * num_kv, self.spec.head_dim)
        qk, v = torch.split(qkv, [num_q + num_kv, num_kv], dim=1)
        if layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, self.spec.rms_norm_eps)
        q, k = torch.split(rotate(qk, *tables), [num_q, num_kv], dim=1)
        return q, k, v


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in float32, cast before the weight as Hugging Face does.

    x [..., dim], weight broadcast to it; returns the shape and dtype of x. Source: arXiv:1910.07467.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def _mlp(layer: LayerWeights, normed: torch.Tensor) -> torch.Tensor:
    """SwiGLU (arXiv:2002.05202): [T, hidden] -> [T, hidden]."""
    gate, up = linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return linear(silu(gate) * up, layer.down, layer.down_bias)


def load_decoder(
    directory: Path, device: torch.device | str, dtype: torch.dtype, spec: ModelSpec | None = None
) -> Decoder:
    """Load the Hugging Face directory onto `device` in `dtype`.

    `spec=None` is that of the directory; another may differ from it in the rotary embedding.
    Raises `ModelError`, naming the file or architecture, when it is missing, corrupt or not supported.
    """
    spec = spec or ModelSpec.from_directory(directory)
    weights = Weights(directory)
    optional = frozenset({"lm_head.weight"} if spec.tie_word_embeddings else ())
    weights.check(parameter_shapes(spec), optional)
    loader = _Loader(spec=spec, weights=weights, device=torch.device(device), dtype=dtype)
    table = loader.one("model.embed_tokens.weight")
    return Decoder(
        spec=spec,
        rope=Rope(spec.rope, spec.head_dim, loader.device),
        embedding=table,
        layers=tuple(loader.layer(index) for index in range(spec.num_layers)),
        norm=loader.one("model.norm.weight"),
        head=table if spec.tie_word_embeddings else loader.one("lm_head.weight"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loader:
    """Reads, casts, moves and fuses; at any time only one unfused layer part is held twice."""

    spec: ModelSpec
    weights: Weights
    device: torch.device
    dtype: torch.dtype

    def one(self, name: str) -> torch.Tensor:
        # copy: the result must not alias the mapped file, which may be replaced under us
        return self.weights.read(name).to(device=self.device, dtype=self.dtype, copy=True)

    def fused(self, prefix: str, names: tuple[str, ...], suffix: str) -> torch.Tensor:
        parts = [self.weights.read(f"{prefix}.{name}.{suffix}") for name in names]
        out = torch.empty(
            (sum(len(part) for part in parts), *parts[0].shape[1:]), dtype=self.dtype, device=self.device
        )
        for target, part in zip(torch.split(out, [len(part) for part in parts]), parts, strict=True):
            target.copy_(part)
        return out

    def layer(self, index: int) -> LayerWeights:
        spec, prefix = self.spec, f"model.layers.{index}"
        qkv, gate_up = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            input_norm=self.one(f"{prefix}.input_layernorm.weight"),
            qkv=self.fused(attention, qkv, "weight"),
            qkv_bias=self.fused(attention, qkv, "bias") if spec.qkv_bias else None,
            qk_norm=self._qk_norm(attention) if spec.qk_norm else None,
            output=self.one(f"{attention}.o_proj.weight"),
            output_bias=self.one(f"{attention}.o_proj.bias") if spec.output_bias else None,
            mlp_norm=self.one(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self.fused(mlp, gate_up, "weight"),
            gate_up_bias=self.fused(mlp, gate_up, "bias") if spec.mlp_bias else None,
            down=self.one(f"{mlp}.down_proj.weight"),
            down_bias=self.one(f"{mlp}.down_proj.bias") if spec.mlp_bias else None,
        )

    def _qk_norm(self, attention: str) -> torch.Tensor:
        counts = {"q_norm": self.spec.num_q_heads, "k_norm": self.spec.num_kv_heads}
        rows = [self.one(f"{attention}.{name}.weight").expand(count, -1) for name, count in counts.items()]
        return torch.cat(rows)
