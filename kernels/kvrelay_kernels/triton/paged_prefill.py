"""Triton kernel of ``paged_prefill``: every page of the sequence; see ``tiled_prefill``."""

from torch import Tensor

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.triton.tiled_prefill import tiled_prefill


def paged_prefill(q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.paged_prefill``."""
    return tiled_prefill("paged_prefill", q, kv, cu_seqlens_q, None, scale)
