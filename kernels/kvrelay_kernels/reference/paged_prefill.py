"""Reference of ``paged_prefill``: dense causal attention over a paged cache."""

from torch import Tensor

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.reference.attention_rows import attend_dense, empty_outputs
from kvrelay_kernels.reference.sequences import iterate_chunks


def paged_prefill(q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.paged_prefill``."""
    out, lse = empty_outputs(q)
    for chunk in iterate_chunks(kv, cu_seqlens_q, q.shape[0]):
        rows = slice(chunk.first_row, chunk.first_row + chunk.q_len)
        out[rows], lse[rows] = attend_dense(q[rows], chunk, scale)
    return out, lse
