"""Operation ``kv_block_stats``: statistics of keys from scratch."""

from kvrelay_kernels.dispatch import implementation
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.stats import KVBlockStats


def kv_block_stats(kv: PagedKV, *, impl: str = "auto") -> KVBlockStats:
    """Statistics of every complete page of every sequence in ``kv``, and of the tree above them.

    Reads ``k_pages [num_blocks, num_kv_heads, 64, head_dim]`` once. Rows of pages that no sequence
    completes are unspecified. Raises InvalidArgument and KernelUnavailable.
    """
    stats: KVBlockStats = implementation("kv_block_stats", impl, kv.k_pages)(kv)
    return stats
