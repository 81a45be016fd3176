"""C++ ``paged_decode``: ``csrc/decode.h``."""

from torch import Tensor

from kvrelay_kernels.cpu.native.attention import attend
from kvrelay_kernels.layout import PagedKV


def paged_decode(q: Tensor, kv: PagedKV, scale: float) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.paged_decode``."""
    return attend(q, kv, None, None, scale)
