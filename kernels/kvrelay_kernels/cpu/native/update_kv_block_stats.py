"""C++ ``update_kv_block_stats``: ``csrc/block_stats.h``."""

from torch import Tensor

from kvrelay_kernels.cpu.native.arguments import paged, raise_for, statistics
from kvrelay_kernels.cpu.native.library import library
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.stats import KVBlockStats


def update_kv_block_stats(stats: KVBlockStats, kv: PagedKV, num_new_tokens: Tensor) -> None:
    """See ``kvrelay_kernels.api.update_kv_block_stats``."""
    cache, to, new = paged(kv), statistics(stats), num_new_tokens.contiguous()
    status = library().kvr_update_stats(cache.pointer, to.pointer, new.data_ptr())
    raise_for(status, kv, None, None)
