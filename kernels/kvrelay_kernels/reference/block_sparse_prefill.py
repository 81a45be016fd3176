"""Reference of ``block_sparse_prefill``: each query block attends to its listed KV blocks."""

from torch import Tensor

from kvrelay_kernels.layout import BLOCK_SIZE, PagedKV
from kvrelay_kernels.reference.attention_rows import attend_rows, empty_outputs
from kvrelay_kernels.reference.select_blocks import check_aligned, listed_blocks
from kvrelay_kernels.reference.sequences import iterate_chunks
from kvrelay_kernels.selection import BlockSelection


def block_sparse_prefill(
    q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.block_sparse_prefill``."""
    out, lse = empty_outputs(q)
    for chunk in iterate_chunks(kv, cu_seqlens_q, q.shape[0]):
        check_aligned(chunk)
        slot = int(selection.cu_q_blocks[chunk.sequence])
        for start in range(0, chunk.q_len, BLOCK_SIZE):
            rows = slice(chunk.first_row + start, chunk.first_row + min(start + BLOCK_SIZE, chunk.q_len))
            blocks = listed_blocks(selection, slot + start // BLOCK_SIZE)
            out[rows], lse[rows] = attend_rows(q[rows], chunk.offset + start, chunk.view, blocks, scale)
    return out, lse
