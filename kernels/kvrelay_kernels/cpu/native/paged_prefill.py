"""C++ ``paged_prefill``: ``csrc/prefill.h``."""

from torch import Tensor

from kvrelay_kernels.cpu.native.attention import attend
from kvrelay_kernels.layout import PagedKV


def paged_prefill(q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.paged_prefill``."""
    return attend(q, kv, cu_seqlens_q, None, scale)
