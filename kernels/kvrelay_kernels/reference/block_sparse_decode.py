"""Reference of ``block_sparse_decode``: one query per sequence over its listed KV blocks."""

from torch import Tensor

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.reference.attention_rows import attend_rows, empty_outputs
from kvrelay_kernels.reference.select_blocks import listed_blocks
from kvrelay_kernels.reference.sequences import iterate_chunks
from kvrelay_kernels.selection import BlockSelection


def block_sparse_decode(
    q: Tensor, kv: PagedKV, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.block_sparse_decode``."""
    out, lse = empty_outputs(q)
    for chunk in iterate_chunks(kv, None, q.shape[0]):
        row = slice(chunk.sequence, chunk.sequence + 1)
        blocks = listed_blocks(selection, chunk.sequence)
        out[row], lse[row] = attend_rows(q[row], chunk.offset, chunk.view, blocks, scale)
    return out, lse
