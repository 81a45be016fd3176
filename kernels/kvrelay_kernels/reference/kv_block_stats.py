"""Reference of ``kv_block_stats``: statistics from scratch."""

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.reference.update_kv_block_stats import update_kv_block_stats
from kvrelay_kernels.stats import KVBlockStats


def kv_block_stats(kv: PagedKV) -> KVBlockStats:
    """See ``kvrelay_kernels.api.kv_block_stats``."""
    stats = KVBlockStats.empty(kv.k_pages)
    update_kv_block_stats(stats, kv, kv.seq_lens)
    return stats
