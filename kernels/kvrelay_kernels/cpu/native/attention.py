"""The two C++ attention kernels, prefill and decode; without lists they are dense."""

from torch import Tensor

from kvrelay_kernels.cpu.native.arguments import lists, outputs, paged, queries, raise_for
from kvrelay_kernels.cpu.native.library import library
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection


def attend(
    q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor | None, selection: BlockSelection | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``q``; ``cu_seqlens_q=None`` is decode. Results as in the reference."""
    kernel = library().kvr_decode if cu_seqlens_q is None else library().kvr_prefill
    out, lse, to = outputs(q)
    cache, rows, chosen = paged(kv), queries(q, cu_seqlens_q, scale), lists(selection)
    status = kernel(cache.pointer, rows.pointer, chosen.pointer, to.pointer)
    raise_for(status, kv, q, cu_seqlens_q)
    return out, lse
