"""Triton kernel of ``block_sparse_decode``: split-KV over each row's list; see ``split_decode``."""

from torch import Tensor

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection
from kvrelay_kernels.triton.split_decode import split_decode


def block_sparse_decode(
    q: Tensor, kv: PagedKV, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.block_sparse_decode``."""
    return split_decode("block_sparse_decode", q, kv, selection, scale)
