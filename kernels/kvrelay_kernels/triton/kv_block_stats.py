"""Triton kernels of ``kv_block_stats``: those of ``update_kv_block_stats``, from the first token on."""

import torch

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.stats import KVBlockStats
from kvrelay_kernels.triton.update_kv_block_stats import update_kv_block_stats


def kv_block_stats(kv: PagedKV) -> KVBlockStats:
    """See ``kvrelay_kernels.api.kv_block_stats``. Rows that no sequence completes stay uninitialised."""
    blocks, heads, _, head_dim = kv.k_pages.shape
    shape, dtype, device = (blocks, heads, head_dim), kv.k_pages.dtype, kv.k_pages.device
    mean, minimum, maximum, lower, upper = (torch.empty(shape, dtype=dtype, device=device) for _ in range(5))
    stats = KVBlockStats(
        mean=mean,
        minimum=minimum,
        maximum=maximum,
        spread=torch.empty(shape[:2], dtype=dtype, device=device),
        coarse_minimum=lower,
        coarse_maximum=upper,
    )
    update_kv_block_stats(stats, kv, kv.seq_lens)
    return stats
