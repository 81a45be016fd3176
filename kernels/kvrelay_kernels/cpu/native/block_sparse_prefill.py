"""C++ ``block_sparse_prefill``: ``csrc/prefill.h``."""

from torch import Tensor

from kvrelay_kernels.cpu.native.attention import attend
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection


def block_sparse_prefill(
    q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.block_sparse_prefill``."""
    return attend(q, kv, cu_seqlens_q, selection, scale)
