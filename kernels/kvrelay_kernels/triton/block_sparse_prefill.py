"""Triton kernel of ``block_sparse_prefill``: the pages of a list; see ``tiled_prefill``."""

from torch import Tensor

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection
from kvrelay_kernels.triton.tiled_prefill import tiled_prefill


def block_sparse_prefill(
    q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.block_sparse_prefill``."""
    return tiled_prefill("block_sparse_prefill", q, kv, cu_seqlens_q, selection, scale)
