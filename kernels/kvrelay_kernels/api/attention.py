"""Checks shared by the four attention operations."""

from torch import Tensor

from kvrelay_kernels.errors import InvalidArgument
from kvrelay_kernels.layout import PagedKV, check_queries, num_query_block_slots
from kvrelay_kernels.selection import BlockSelection


def softmax_scale(scale: float | None, kv: PagedKV) -> float:
    """``scale``, or the usual ``head_dim ** -0.5``. Raises InvalidArgument unless positive."""
    chosen = kv.head_dim**-0.5 if scale is None else scale
    if not chosen > 0:
        raise InvalidArgument("scale", needed="a positive number", got=scale)
    return float(chosen)


def check_sparse(q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor | None, selection: BlockSelection) -> None:
    """Raise InvalidArgument unless q, kv and selection belong together."""
    check_queries(q, kv, cu_seqlens_q)
    slots = kv.batch if cu_seqlens_q is None else num_query_block_slots(q.shape[0], kv.batch)
    selection.check(slots, kv.num_kv_heads, kv.batch)
