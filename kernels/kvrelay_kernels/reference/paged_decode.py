"""Reference of ``paged_decode``: one query per sequence over its whole paged cache."""

from torch import Tensor

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.reference.attention_rows import attend_dense, empty_outputs
from kvrelay_kernels.reference.sequences import iterate_chunks


def paged_decode(q: Tensor, kv: PagedKV, scale: float) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.paged_decode``."""
    out, lse = empty_outputs(q)
    for chunk in iterate_chunks(kv, None, q.shape[0]):
        row = slice(chunk.sequence, chunk.sequence + 1)
        out[row], lse[row] = attend_dense(q[row], chunk, scale)
    return out, lse
