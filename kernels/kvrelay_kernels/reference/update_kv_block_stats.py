"""Reference of ``update_kv_block_stats``: statistics of the pages and nodes that an append completed."""

import torch
from torch import Tensor

from kvrelay_kernels.layout import BLOCK_SIZE, FANOUT, HOME_OFFSETS, PagedKV
from kvrelay_kernels.reference.sequences import SequenceView, compute_dtype, sequence_view
from kvrelay_kernels.stats import KVBlockStats


def update_kv_block_stats(stats: KVBlockStats, kv: PagedKV, num_new_tokens: Tensor) -> None:
    """See ``kvrelay_kernels.api.update_kv_block_stats``."""
    for sequence in range(kv.batch):
        view = sequence_view(kv, sequence)
        first = max(view.num_tokens - int(num_new_tokens[sequence]), 0) // BLOCK_SIZE
        completed = torch.arange(first, view.num_complete, device=kv.k_pages.device)
        if len(completed):
            _write_pages(stats, view, completed)
            for level in range(1, len(HOME_OFFSETS)):
                _write_nodes(stats, view, completed, level)


def _write_pages(stats: KVBlockStats, view: SequenceView, completed: Tensor) -> None:
    pages = view.table[completed]
    keys = view.kv.k_pages[pages].to(compute_dtype(view.kv.k_pages.dtype))  # [n, H, 64, d]
    mean = keys.mean(2)
    stats.mean[pages] = mean.to(stats.mean.dtype)
    stats.minimum[pages] = keys.amin(2).to(stats.minimum.dtype)
    stats.maximum[pages] = keys.amax(2).to(stats.maximum.dtype)
    spread = (keys - mean[:, :, None]).square().sum(-1).mean(-1).sqrt()
    stats.spread[pages] = spread.to(stats.spread.dtype)


def _write_nodes(stats: KVBlockStats, view: SequenceView, completed: Tensor, level: int) -> None:
    """Merge the children of every node of ``level`` whose home is among the ``completed`` pages."""
    after = completed - HOME_OFFSETS[level]  # first page after the node, if a node lives here
    is_home = (after % FANOUT**level == 0) & (after > 0)
    node = after[is_home] // FANOUT**level - 1
    child = node[:, None] * FANOUT + torch.arange(FANOUT, device=node.device)
    homes = view.table[(child + 1) * FANOUT ** (level - 1) + HOME_OFFSETS[level - 1]]  # [n, 4]
    lower = stats.minimum if level == 1 else stats.coarse_minimum
    upper = stats.maximum if level == 1 else stats.coarse_maximum
    pages = view.table[completed[is_home]]
    stats.coarse_minimum[pages] = lower[homes].amin(1)
    stats.coarse_maximum[pages] = upper[homes].amax(1)
