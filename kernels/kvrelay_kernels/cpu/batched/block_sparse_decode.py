"""Batched torch ``block_sparse_decode``: prefill of one row a sequence."""

from torch import Tensor

from kvrelay_kernels.cpu.batched.block_sparse_prefill import block_sparse_prefill
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection


def block_sparse_decode(
    q: Tensor, kv: PagedKV, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.block_sparse_decode``."""
    return block_sparse_prefill(q, kv, None, selection, scale)
