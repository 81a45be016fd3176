"""Batched torch ``block_sparse_prefill``."""

from functools import partial

import torch
from torch import Tensor

from kvrelay_kernels.cpu.batched.attention import attend_chunk
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.reference.attention_rows import empty_outputs
from kvrelay_kernels.reference.select_blocks import check_aligned
from kvrelay_kernels.reference.sequences import iterate_chunks
from kvrelay_kernels.selection import BlockSelection


def block_sparse_prefill(
    q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor | None, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.block_sparse_prefill``; ``cu_seqlens_q=None`` is decode."""
    out, lse = empty_outputs(q)
    past = torch.arange(selection.indices.shape[2]) >= selection.counts[..., None]
    lists = selection.indices.long().masked_fill(past, -1)
    for chunk in iterate_chunks(kv, cu_seqlens_q, q.shape[0]):
        if cu_seqlens_q is not None:
            check_aligned(chunk)
        rows = slice(chunk.first_row, chunk.first_row + chunk.q_len)
        mine = lists[int(selection.cu_q_blocks[chunk.sequence]) :]
        out[rows], lse[rows] = attend_chunk(q[rows], chunk, partial(_part, mine), lists.shape[2], scale)
    return out, lse


def _part(lists: Tensor, first: int, last: int) -> Tensor:
    return lists[first:last]
