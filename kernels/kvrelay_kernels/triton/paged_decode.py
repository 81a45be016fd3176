"""Triton kernel of ``paged_decode``: split-KV over whole sequences; see ``split_decode``."""

from torch import Tensor

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.triton.split_decode import split_decode


def paged_decode(q: Tensor, kv: PagedKV, scale: float) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.paged_decode``."""
    return split_decode("paged_decode", q, kv, None, scale)
