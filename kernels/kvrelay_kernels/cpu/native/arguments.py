"""Turns tensors into the structs of the C interface, and its status codes into errors."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kvrelay_kernels.cpu.native.library import (
    DTYPES,
    ListsStruct,
    OutputsStruct,
    PagedKVStruct,
    QueriesStruct,
    StatsStruct,
)
from kvrelay_kernels.errors import InvalidArgument
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.reference.select_blocks import check_aligned
from kvrelay_kernels.reference.sequences import iterate_chunks, sequence_view
from kvrelay_kernels.selection import BlockSelection
from kvrelay_kernels.stats import KVBlockStats


@dataclass(frozen=True, slots=True)
class Argument:
    """A struct and the tensors its pointers point into, which must outlive the call."""

    struct: ctypes.Structure
    tensors: tuple[Tensor | None, ...]

    @property
    def pointer(self) -> int:
        return ctypes.addressof(self.struct)


def paged(kv: PagedKV) -> Argument:
    """``PagedKV``; copies what has strided channels or entries."""
    k, v = _channels_contiguous(kv.k_pages), _channels_contiguous(kv.v_pages)
    table = kv.block_table if kv.block_table.stride(-1) == 1 else kv.block_table.contiguous()
    seq_lens = kv.seq_lens.contiguous()
    struct = PagedKVStruct(
        k=k.data_ptr(),
        v=v.data_ptr(),
        k_stride=k.stride()[:3],
        v_stride=v.stride()[:3],
        block_table=table.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        table_stride=table.stride(0),
        batch=kv.batch,
        max_blocks=table.shape[1],
        num_blocks=k.shape[0],
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        dtype=DTYPES[k.dtype],
        num_threads=torch.get_num_threads(),
    )
    return Argument(struct, (k, v, table, seq_lens))


def queries(q: Tensor, cu_seqlens_q: Tensor | None, scale: float) -> Argument:
    """``Queries``; copies rows with strided channels."""
    q = _channels_contiguous(q)
    bounds = None if cu_seqlens_q is None else cu_seqlens_q.contiguous()
    struct = QueriesStruct(
        q=q.data_ptr(),
        q_stride=q.stride()[:2],
        cu_seqlens_q=None if bounds is None else bounds.data_ptr(),
        total_q=q.shape[0],
        num_q_heads=q.shape[1],
        scale=scale,
    )
    return Argument(struct, (q, bounds))


def lists(selection: BlockSelection | None) -> Argument:
    """``Lists``; None is dense."""
    if selection is None:
        return Argument(ListsStruct(), ())
    tensors = tuple(t.contiguous() for t in (selection.indices, selection.counts, selection.cu_q_blocks))
    pointers = (tensor.data_ptr() for tensor in tensors)
    return Argument(ListsStruct(*pointers, selection.indices.shape[2]), tensors)


def outputs(q: Tensor) -> tuple[Tensor, Tensor, Argument]:
    """Uninitialised ``out`` and ``lse``, of which a kernel writes every row, and their struct."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2])
    return out, lse, Argument(OutputsStruct(out.data_ptr(), lse.data_ptr()), (out, lse))


def statistics(stats: KVBlockStats) -> Argument:
    """``Stats``, which must be contiguous: they are written in place."""
    names = ("mean", "minimum", "maximum", "spread", "coarse_minimum", "coarse_maximum")
    tensors = tuple(getattr(stats, name) for name in names)
    for name, tensor in zip(names, tensors, strict=True):
        if not tensor.is_contiguous():
            raise InvalidArgument(f"stats.{name}", needed="a contiguous tensor", got=tensor.stride())
    return Argument(StatsStruct(*(tensor.data_ptr() for tensor in tensors)), tensors)


def raise_for(status: int, kv: PagedKV, q: Tensor | None, cu_seqlens_q: Tensor | None) -> None:
    """Raise what the reference raises for the same arguments if a kernel refused them."""
    if status == 0:
        return
    if q is None:
        for sequence in range(kv.batch):
            sequence_view(kv, sequence)
    else:
        for chunk in iterate_chunks(kv, cu_seqlens_q, q.shape[0]):
            if cu_seqlens_q is not None:
                check_aligned(chunk)
    raise InvalidArgument(
        "selection", needed="blocks of their own sequence, a list per query block", got=status
    )


def _channels_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
