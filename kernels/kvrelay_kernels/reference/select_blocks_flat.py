"""Selectors that look at every page's statistics once: ``local``, ``mean_pool`` and ``quest``.

``box_bound`` is quest's and the tree's: the upper bound of a query's logit over the keys in a box.
"""

import torch
from torch import Tensor

from kvrelay_kernels.reference.query_groups import QueryGroup, ScoredBlocks, mean_over_rows
from kvrelay_kernels.selection import SelectionConfig


def box_bound(q: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Largest ``q.k`` over all k with ``lower <= k <= upper`` per channel (Quest, arXiv 2406.10774, eq. 2).

    q ``[heads, r, d]``, lower and upper ``[heads, n, d]`` give ``[heads, r, n]``.
    """
    return q.clamp(min=0) @ upper.transpose(-1, -2) + q.clamp(max=0) @ lower.transpose(-1, -2)


def local(group: QueryGroup, config: SelectionConfig, _scale: float) -> ScoredBlocks:
    """Sinks and the most recent blocks, nothing else (StreamingLLM, arXiv 2309.17453). Fills the budget."""
    last = int(group.own_blocks[-1])
    first = max(0, int(group.own_blocks[0]) - config.budget + 1)
    sinks = torch.arange(min(config.sink_blocks, first), device=group.q.device)
    blocks = torch.cat([sinks, torch.arange(first, last + 1, device=group.q.device)])
    recency = (blocks + 1) / (last + 1)
    heads = group.q.shape[1]
    return ScoredBlocks(
        blocks=blocks.expand(heads, -1),
        scores=recency.to(group.q.dtype).expand(heads, len(group.own_blocks), -1),
    )


def mean_pool(group: QueryGroup, _config: SelectionConfig, scale: float) -> ScoredBlocks:
    """Mean query against mean key of each page (MoBA, arXiv 2502.13189, eq. 6)."""
    blocks = _earlier_blocks(group)
    logits = group.pooled() @ group.view.statistic("mean", blocks).transpose(-1, -2) * scale
    return _with_own(group, blocks, logits)


def quest(group: QueryGroup, _config: SelectionConfig, scale: float) -> ScoredBlocks:
    """Mean query against the min/max box of each page (Quest, arXiv 2406.10774)."""
    blocks = _earlier_blocks(group)
    lower, upper = (group.view.statistic(name, blocks) for name in ("minimum", "maximum"))
    return _with_own(group, blocks, box_bound(group.pooled(), lower, upper) * scale)


def _earlier_blocks(group: QueryGroup) -> Tensor:
    """Every block before the last query block's own, ``[heads, n]``: complete, so they have statistics."""
    last = int(group.own_blocks[-1])
    return torch.arange(last, device=group.q.device).expand(group.q.shape[1], -1)


def _with_own(group: QueryGroup, blocks: Tensor, logits: Tensor) -> ScoredBlocks:
    """Softmax over the blocks before each query block, mean over its heads; own blocks get score 0."""
    own = group.own_blocks
    m = len(own)
    rows = own.repeat_interleave(logits.shape[1] // m)
    hidden = blocks[:, None] >= rows[None, :, None]
    shares = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    scores = torch.nn.functional.pad(mean_over_rows(shares, m), (0, 1))
    last = own[-1:].expand(blocks.shape[0], 1)
    return ScoredBlocks(blocks=torch.cat([blocks, last], dim=1), scores=scores)
