"""C++ ``block_sparse_decode``: ``csrc/decode.h``."""

from torch import Tensor

from kvrelay_kernels.cpu.native.attention import attend
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection


def block_sparse_decode(
    q: Tensor, kv: PagedKV, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.block_sparse_decode``."""
    return attend(q, kv, None, selection, scale)
