"""Batched torch ``paged_prefill``."""

from torch import Tensor

from kvrelay_kernels.cpu.batched.attention import attend_chunk, dense_lists
from kvrelay_kernels.layout import BLOCK_SIZE, PagedKV
from kvrelay_kernels.reference.attention_rows import empty_outputs
from kvrelay_kernels.reference.sequences import iterate_chunks


def paged_prefill(q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.paged_prefill``; ``cu_seqlens_q=None`` is decode."""
    out, lse = empty_outputs(q)
    for chunk in iterate_chunks(kv, cu_seqlens_q, q.shape[0]):
        rows = slice(chunk.first_row, chunk.first_row + chunk.q_len)
        width = chunk.view.num_tokens // BLOCK_SIZE + 1
        out[rows], lse[rows] = attend_chunk(q[rows], chunk, dense_lists(chunk), width, scale)
    return out, lse
