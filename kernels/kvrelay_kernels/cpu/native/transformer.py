"""A C++ Llama-like decoder: layers around attention, and a whole decode step in one call.

``csrc/transformer.h``. Weights are float32 or bfloat16, arithmetic is float32. A row's result does not depend
on its batch. Knows nothing of checkpoints.
"""

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from kvrelay_kernels.cpu.native.arguments import statistics
from kvrelay_kernels.cpu.native.library import DTYPES, StatsStruct, library
from kvrelay_kernels.cpu.native.linear import PackedLinear, float_rows
from kvrelay_kernels.cpu.native.select_blocks import tree_settings
from kvrelay_kernels.cpu.native.transformer_structs import (
    LayerStruct,
    ModelStruct,
    SelectingStruct,
    StepStruct,
)
from kvrelay_kernels.errors import InvalidArgument
from kvrelay_kernels.selection import SelectionConfig
from kvrelay_kernels.stats import KVBlockStats

_STATUS = {
    1: ("seq_lens", "1 or more tokens each, and blocks for them"),
    2: ("block_table", "pages of the pool"),
    4: ("token_ids", "ids within the vocabulary"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    """One layer. ``gate_up`` is packed from ``interleave(gate, up)``; norms are float32 ``[hidden]``.

    ``qk_norm`` is float32 ``[num_q_heads + num_kv_heads, head_dim]`` or None.
    """

    input_norm: Tensor
    qkv: PackedLinear
    qk_norm: Tensor | None
    output: PackedLinear
    mlp_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear

    @property
    def struct(self) -> LayerStruct:
        """As the C interface takes it; points into this object's tensors."""
        qk_norm = None if self.qk_norm is None else self.qk_norm.data_ptr()
        norms = (self.input_norm.data_ptr(), qk_norm, self.mlp_norm.data_ptr())
        return LayerStruct(*norms, *(x.struct for x in (self.qkv, self.output, self.gate_up, self.down)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedModel:
    """All weights, and the numbers that are none: ``inverse_frequencies`` float32 ``[head_dim / 2]``."""

    layers: Sequence[PackedLayer]
    embedding: PackedLinear
    head: PackedLinear
    norm: Tensor
    inverse_frequencies: Tensor
    rotary_factor: float
    eps: float
    intermediate: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


class Pages:
    """The paged K and V of every layer, each ``[num_blocks, num_kv_heads, 64, head_dim]``, strides alike.

    ``stats`` of every layer, if they are kept, are updated as pages become full.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], stats: Sequence[KVBlockStats] = ()) -> None:
        k, v = layers[0]
        if k.dtype not in DTYPES or k.stride(-1) != 1 or v.stride(-1) != 1 or k.shape[2] != 64:
            got = (k.dtype, tuple(k.shape), k.stride())
            raise InvalidArgument("pages", needed="float32 or bfloat16, 64 tokens, dense channels", got=got)
        if len(stats) not in (0, len(layers)):
            needed = f"those of all {len(layers)} layers, or none"
            raise InvalidArgument("stats", needed=needed, got=len(stats))
        self.tensors, self.first = list(layers), (k, v)
        pointers = ctypes.c_void_p * len(layers)
        self.k = pointers(*(k.data_ptr() for k, _ in layers))
        self.v = pointers(*(v.data_ptr() for _, v in layers))
        self._stats = [statistics(layer) for layer in stats]
        structs = cast(list[StatsStruct], [layer.struct for layer in self._stats])
        self.stats = (StatsStruct * len(structs))(*structs) if structs else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selecting:
    """What decides which blocks the queries of a step read, by the selector ``tree``.

    lists_per_group: 1, or as many as a KV group has query heads, which then have lists of their own.
    dense_layers: layers that read everything.
    """

    config: SelectionConfig
    lists_per_group: int
    dense_layers: Collection[int]


class Transformer:
    """Runs a ``PackedModel``."""

    def __init__(self, model: PackedModel) -> None:
        self._model = model
        self._layers = (LayerStruct * len(model.layers))(*(layer.struct for layer in model.layers))
        self._struct = ModelStruct(
            layers=ctypes.addressof(self._layers),
            embedding=model.embedding.struct,
            head=model.head.struct,
            norm=model.norm.data_ptr(),
            inverse_frequencies=model.inverse_frequencies.data_ptr(),
            hidden=model.embedding.num_in,
            intermediate=model.intermediate,
            vocab=model.head.num_out,
            num_layers=len(model.layers),
            num_q_heads=model.num_q_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            eps=model.eps,
            rotary_factor=model.rotary_factor,
        )
        self.hidden_size, self.vocab_size = model.embedding.num_in, model.head.num_out
        self.num_layers, self.head_dim = len(model.layers), model.head_dim
        self.num_q_heads, self.num_kv_heads = model.num_q_heads, model.num_kv_heads

    def first_layers(self, count: int) -> "Transformer":
        """The model with so many layers, on the same weights. Raises ``InvalidArgument``."""
        if not 1 <= count <= self.num_layers:
            raise InvalidArgument("count", needed=f"1 to {self.num_layers} layers", got=count)
        return Transformer(replace(self._model, layers=self._model.layers[:count]))

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 ``[rows]`` -> float32 ``[rows, hidden]``; ``InvalidArgument`` for an id outside."""
        token_ids = token_ids.long().contiguous()
        out = torch.empty(len(token_ids), self.hidden_size)
        _check(library().kvr_embed(self._pointer, token_ids.data_ptr(), len(out), out.data_ptr()))
        return out

    def rotary(self, positions: Tensor) -> Tensor:
        """int64 ``[rows]`` -> float32 ``[rows, head_dim]``: cosines, then sines."""
        positions = positions.long().contiguous()
        out = torch.empty(len(positions), self.head_dim)
        library().kvr_rotary(self._pointer, positions.data_ptr(), len(out), out.data_ptr())
        return out

    def before_attention(self, layer: int, hidden: Tensor, rotary: Tensor) -> Tensor:
        """``hidden [rows, hidden]`` -> float32 ``[rows, q + k + v heads, head_dim]``, q and k rotated."""
        hidden = float_rows(hidden, self.hidden_size)
        qkv = torch.empty(len(hidden), self.num_q_heads + 2 * self.num_kv_heads, self.head_dim)
        pointers = (hidden.data_ptr(), rotary.data_ptr(), len(hidden), qkv.data_ptr())
        library().kvr_before_attention(self._pointer, layer, *pointers)
        return qkv

    def after_attention(self, layer: int, attended: Tensor, hidden: Tensor) -> None:
        """Output projection of ``attended [rows, q heads * head_dim]``, then MLP: ``hidden`` in place."""
        attended = float_rows(attended, self.num_q_heads * self.head_dim)
        library().kvr_after_attention(
            self._pointer, layer, attended.data_ptr(), len(attended), hidden.data_ptr()
        )

    def last_norm(self, hidden: Tensor) -> Tensor:
        """The norm before the head, ``[rows, hidden]``."""
        hidden = float_rows(hidden, self.hidden_size)
        out = torch.empty_like(hidden)
        library().kvr_last_norm(self._pointer, hidden.data_ptr(), len(hidden), out.data_ptr())
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [rows, hidden]`` after the last norm -> float32 ``[rows, vocab]``."""
        return self._model.head(hidden)

    def step(
        self,
        token_ids: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        pages: Pages,
        selecting: Selecting | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A decode step: float32 logits ``[batch, vocab]`` of one new token for each sequence.

        ``token_ids [batch]``, ``seq_lens [batch]`` (the new token included) and ``block_table [batch,
        max_blocks]`` are contiguous int32. Its K and V are stored in the pages. Where the queries select, the
        pages have statistics. Also int64 ``[batch]``: how many blocks were in the lists of all layers and
        heads. Raises ``InvalidArgument``.
        """
        if len(pages.tensors) != self.num_layers:
            raise InvalidArgument(
                "pages", needed=f"those of {self.num_layers} layers", got=len(pages.tensors)
            )
        k, v = pages.first
        logits = torch.empty(len(token_ids), self.vocab_size)
        counts = torch.zeros(len(token_ids), dtype=torch.int64)
        if selecting is not None and (selecting.config.selector != "tree" or pages.stats is None):
            got = (selecting.config.selector, None if pages.stats is None else "statistics")
            raise InvalidArgument("selecting", needed="the selector 'tree' and statistics", got=got)
        chosen, _pointed_into = (None, None) if selecting is None else self._selecting(selecting, counts)
        step = StepStruct(
            token_ids=token_ids.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            block_table=block_table.data_ptr(),
            k_pages=ctypes.addressof(pages.k),
            v_pages=ctypes.addressof(pages.v),
            k_stride=k.stride()[:3],
            v_stride=v.stride()[:3],
            batch=len(token_ids),
            table_stride=block_table.shape[1],
            max_blocks=block_table.shape[1],
            num_blocks=k.shape[0],
            kv_dtype=DTYPES[k.dtype],
            logits=logits.data_ptr(),
            stats=None if pages.stats is None else ctypes.addressof(pages.stats),
            selecting=None if chosen is None else ctypes.addressof(chosen),
        )
        _check(library().kvr_step(self._pointer, ctypes.addressof(step)))
        return logits, counts

    def _selecting(self, selecting: Selecting, counts: Tensor) -> tuple[SelectingStruct, Any]:
        """The struct, and what it points into."""
        if selecting.lists_per_group not in (1, self.num_q_heads // self.num_kv_heads):
            needed = f"1 or {self.num_q_heads // self.num_kv_heads}"
            raise InvalidArgument("lists_per_group", needed=needed, got=selecting.lists_per_group)
        layers = range(self.num_layers)
        dense_layers = (ctypes.c_uint8 * self.num_layers)(*(n in selecting.dense_layers for n in layers))
        config = tree_settings(selecting.config)
        struct = SelectingStruct(
            config=config.pointer,
            dense_layers=ctypes.addressof(dense_layers),
            counts=counts.data_ptr(),
            lists_per_group=selecting.lists_per_group,
        )
        return struct, (config, dense_layers)

    @property
    def _pointer(self) -> int:
        self._struct.num_threads = torch.get_num_threads()
        return ctypes.addressof(self._struct)


def _check(status: int) -> None:
    if status:
        argument, needed = _STATUS[status]
        raise InvalidArgument(argument, needed=needed, got="others")
