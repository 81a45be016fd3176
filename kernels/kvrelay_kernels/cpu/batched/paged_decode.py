"""Batched torch ``paged_decode``: prefill of one row a sequence."""

from torch import Tensor

from kvrelay_kernels.cpu.batched.paged_prefill import paged_prefill
from kvrelay_kernels.layout import PagedKV


def paged_decode(q: Tensor, kv: PagedKV, scale: float) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.paged_decode``."""
    return paged_prefill(q, kv, None, scale)
