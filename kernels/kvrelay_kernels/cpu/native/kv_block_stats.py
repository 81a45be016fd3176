"""C++ ``kv_block_stats``: everything counts as new."""

from kvrelay_kernels.cpu.native.update_kv_block_stats import update_kv_block_stats
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.stats import KVBlockStats


def kv_block_stats(kv: PagedKV) -> KVBlockStats:
    """See ``kvrelay_kernels.api.kv_block_stats``."""
    stats = KVBlockStats.empty(kv.k_pages)
    update_kv_block_stats(stats, kv, kv.seq_lens)
    return stats
