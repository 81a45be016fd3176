"""The decoder in C++ (`kvrelay_kernels`): the interface of `decoder.Decoder`, and a decode step in one call.

Weights stay in the checkpoint's bfloat16 and are widened in registers, which changes no result: arithmetic is
float32. `dtype` is that of q, k, v and of the pages. CPU only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvrelay.models.decoder import Attend
from kvrelay.models.parameters import parameter_shapes
from kvrelay.models.rope import inverse_frequencies
from kvrelay.models.spec import MODELS, Family, ModelSpec
from kvrelay.models.weights import Weights
from kvrelay_kernels.cpu.native.library import instruction_set, why_not
from kvrelay_kernels.cpu.native.linear import PackedLinear, interleave, pack_linear
from kvrelay_kernels.cpu.native.transformer import PackedLayer, PackedModel, Pages, Selecting, Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeDecoder:
    """The packed weights of a model and its forward pass; holds no state of any request."""

    spec: ModelSpec
    dtype: torch.dtype
    transformer: Transformer

    @property
    def impl(self) -> str:
        """What computes: C++, and for which instruction set."""
        return f"native-{instruction_set()}"

    @property
    def device(self) -> torch.device:
        """Device of every weight."""
        return torch.device("cpu")

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend, *, kv_only: bool = False
    ) -> torch.Tensor:
        """As `Decoder.forward`, but hidden states are float32 whatever `dtype` is."""
        native, num_q, num_kv = self.transformer, self.spec.num_q_heads, self.spec.num_kv_heads
        hidden, rotary = native.embed(token_ids), native.rotary(positions)
        for index in range(self.spec.num_layers):
            qkv = native.before_attention(index, hidden, rotary).to(self.dtype)
            attended = attend(index, *torch.split(qkv, [num_q, num_kv, num_kv], dim=1))
            if kv_only and index == self.spec.num_layers - 1:
                return hidden[:0]
            native.after_attention(index, attended.flatten(1), hidden)
        return native.last_norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [R, vocab] for the rows of `hidden` [R, hidden] that the caller picked."""
        return self.transformer.logits(hidden)

    def step(
        self,
        token_ids: Sequence[int],
        seq_lens: Sequence[int],
        block_ids: Sequence[Sequence[int]],
        pages: Pages,
        selecting: Selecting | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One new token for each sequence: its K and V into the pages, float32 logits [B, vocab] out.

        `seq_lens` count the new token; `block_ids` are each sequence's pages. Also how many blocks were in
        each sequence's lists, of all layers and heads, int64 [B].
        """
        width = max(map(len, block_ids))
        table = [[*blocks, *(0 for _ in range(width - len(blocks)))] for blocks in block_ids]
        tokens, lengths, blocks = (torch.tensor(x, dtype=torch.int32) for x in (token_ids, seq_lens, table))
        return self.transformer.step(tokens, lengths, blocks, pages, selecting)


def why_not_native(spec: ModelSpec, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why this model cannot run in C++ here, or None."""
    if torch.device(device).type != "cpu":
        return f"device is {device}, needed cpu"
    if MODELS[spec.architecture].loader != Family().loader:
        return f"{spec.architecture} has a loader of its own"
    sizes = (spec.hidden_size, spec.intermediate_size)
    if any(size % 2 for size in sizes):
        return f"hidden and intermediate sizes are {sizes}, needed even ones"
    return why_not(dtype, spec.head_dim)


def load_native_decoder(directory: Path, dtype: torch.dtype, spec: ModelSpec | None = None) -> NativeDecoder:
    """Load and pack a Hugging Face directory; `spec` and errors as for `load_decoder`."""
    spec = spec or ModelSpec.from_directory(directory)
    weights = Weights(directory)
    optional = frozenset({"lm_head.weight"} if spec.tie_word_embeddings else ())
    weights.check(parameter_shapes(spec), optional)
    packer = _Packer(spec=spec, weights=weights, dtype=dtype)
    embedding = packer.linear("model.embed_tokens")
    inverse, factor = inverse_frequencies(spec.rope, spec.head_dim)
    model = PackedModel(
        layers=[packer.layer(index) for index in range(spec.num_layers)],
        embedding=embedding,
        head=embedding if spec.tie_word_embeddings else packer.linear("lm_head"),
        norm=packer.norm("model.norm.weight"),
        inverse_frequencies=inverse,
        rotary_factor=factor,
        eps=spec.rms_norm_eps,
        intermediate=spec.intermediate_size,
        num_q_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )
    return NativeDecoder(spec=spec, dtype=dtype, transformer=Transformer(model))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packer:
    """Reads, fuses and packs, one layer part at a time."""

    spec: ModelSpec
    weights: Weights
    dtype: torch.dtype

    def read(self, name: str) -> torch.Tensor:
        """In bfloat16 where the checkpoint has it or the user asked for it, else in float32."""
        tensor = self.weights.read(name)
        is_short = tensor.dtype == torch.bfloat16 or self.dtype == torch.bfloat16
        return tensor.to(torch.bfloat16 if is_short else torch.float32)

    def norm(self, name: str) -> torch.Tensor:
        return self.read(name).to(torch.float32, copy=True)  # never a view of the mapped file

    def linear(self, *names: str, bias: bool = False) -> PackedLinear:
        """Layers that read the same input, stacked along their outputs."""
        stacked = torch.cat([self.read(f"{name}.weight") for name in names])
        return pack_linear(
            stacked, torch.cat([self.read(f"{name}.bias") for name in names]) if bias else None
        )

    def gate_up(self, mlp: str) -> PackedLinear:
        weight, bias = (
            interleave(*(self.read(f"{mlp}.{name}_proj.{suffix}") for name in ("gate", "up")))
            if suffix == "weight" or self.spec.mlp_bias
            else None
            for suffix in ("weight", "bias")
        )
        assert weight is not None
        return pack_linear(weight, bias)

    def layer(self, index: int) -> PackedLayer:
        spec, prefix = self.spec, f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return PackedLayer(
            input_norm=self.norm(f"{prefix}.input_layernorm.weight"),
            qkv=self.linear(*(f"{attention}.{x}_proj" for x in "qkv"), bias=spec.qkv_bias),
            qk_norm=self._qk_norm(attention) if spec.qk_norm else None,
            output=self.linear(f"{attention}.o_proj", bias=spec.output_bias),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self.gate_up(mlp),
            down=self.linear(f"{mlp}.down_proj", bias=spec.mlp_bias),
        )

    def _qk_norm(self, attention: str) -> torch.Tensor:
        counts = {"q_norm": self.spec.num_q_heads, "k_norm": self.spec.num_kv_heads}
        rows = [self.norm(f"{attention}.{name}.weight").expand(count, -1) for name, count in counts.items()]
        return torch.cat(rows)
