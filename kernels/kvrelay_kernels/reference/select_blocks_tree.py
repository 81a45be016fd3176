"""Selectors ``tree`` (the default) and ``two_stage``: bounds name candidates, sampled queries decide.

A group of sibling query blocks walks down the tree of key boxes with its mean queries, keeping a beam of
nodes per level (``tree``) or scans all pages (``two_stage``). The candidates it ends with are scored
exactly by a few rows of every query block. Bounds: Quest (arXiv 2406.10774); tree, sharing and rerank: this
library.
"""

import torch
from torch import Tensor

from kvrelay_kernels.layout import FANOUT, HOME_OFFSETS
from kvrelay_kernels.reference.query_groups import (
    QueryGroup,
    ScoredBlocks,
    block_masses,
    forced_blocks,
    scored_by_rows,
)
from kvrelay_kernels.reference.select_blocks_flat import box_bound
from kvrelay_kernels.selection import SelectionConfig


def tree(group: QueryGroup, config: SelectionConfig, scale: float) -> ScoredBlocks:
    """Beam search down the tree, then the rerank: n log n over all query blocks."""
    level = start_level(group.frontier, config.beam)
    nodes = torch.arange(-(-group.frontier // FANOUT**level), device=group.q.device)
    frontier = nodes.expand(group.q.shape[1], -1)
    while level > 0:
        kept = _keep_nodes(group, frontier, level, config.beam, scale)
        level -= 1
        frontier = _children(kept, level, group.frontier)
    return _rerank(group, _candidates(group, frontier, config, scale), config, scale)


def two_stage(group: QueryGroup, config: SelectionConfig, scale: float) -> ScoredBlocks:
    """Bounds of every page, then the rerank: quadratic in pages, the tree's own yardstick."""
    pages = torch.arange(group.frontier, device=group.q.device).expand(group.q.shape[1], -1)
    return _rerank(group, _candidates(group, pages, config, scale), config, scale)


def start_level(frontier: int, beam: int) -> int:
    """Finest level whose nodes over ``frontier`` pages fit in the beam (or the coarsest there is)."""
    level = 0
    while -(-frontier // FANOUT**level) > beam and level < len(HOME_OFFSETS) - 1:
        level += 1
    return level


def _keep_nodes(group: QueryGroup, nodes: Tensor, level: int, beam: int, scale: float) -> Tensor:
    """The ``beam`` best of ``nodes [heads, n]`` (-1: none) and every node that has no box yet.

    A node has none when its home page is not known to be complete: it straddles, or just touches, the causal
    frontier. There are at most two such nodes per level, and they are kept on top of the beam.
    """
    homes = (nodes + 1) * FANOUT**level + HOME_OFFSETS[level]
    boxed = (nodes >= 0) & (homes < group.frontier)
    straddling = nodes.masked_fill(boxed, -1)
    scores = _bound_shares(group, homes.masked_fill(~boxed, -1), level, scale)
    top = scores.topk(min(beam, nodes.shape[1]), dim=-1)
    best = nodes.gather(1, top.indices).masked_fill(top.values == -torch.inf, -1)
    return torch.cat([best, straddling.sort(-1, descending=True).values[:, :2]], dim=1)


def _children(nodes: Tensor, level: int, frontier: int) -> Tensor:
    child = (nodes[..., None] * FANOUT + torch.arange(FANOUT, device=nodes.device)).flatten(1)
    missing = (nodes < 0).repeat_interleave(FANOUT, dim=1) | (child * FANOUT**level >= frontier)
    return child.masked_fill(missing, -1)


def _bound_shares(group: QueryGroup, homes: Tensor, level: int, scale: float) -> Tensor:
    """Softmax of the bounds over the nodes, mean over siblings and heads, ``[heads, n]``; -inf where none."""
    prefix = "coarse_" if level else ""
    lower, upper = (group.view.statistic(prefix + name, homes) for name in ("minimum", "maximum"))
    bounds = box_bound(group.pooled(), lower, upper) * scale
    bounds = bounds.masked_fill((homes < 0)[:, None], -torch.inf)
    return bounds.softmax(-1).mean(1).masked_fill(homes < 0, -torch.inf)


def _candidates(group: QueryGroup, pages: Tensor, config: SelectionConfig, scale: float) -> Tensor:
    """The best ``num_candidates`` of ``pages [heads, n]`` that are not forced anyway, -1 padded."""
    forced = (pages[..., None] == forced_blocks(group, config)).any(-1)
    pages = pages.masked_fill(forced, -1)
    top = _bound_shares(group, pages, 0, scale).topk(min(config.num_candidates, pages.shape[1]), dim=-1)
    return pages.gather(1, top.indices).masked_fill(top.values == -torch.inf, -1)


def _rerank(group: QueryGroup, candidates: Tensor, config: SelectionConfig, scale: float) -> ScoredBlocks:
    """Exact masses of the sampled rows on the candidates and the forced blocks."""
    forced = forced_blocks(group, config).expand(group.q.shape[1], -1)
    blocks = torch.cat([forced, candidates.sort(-1).values], dim=1)
    rows, positions = group.sampled(config.sampled_queries)
    masses = block_masses(rows, positions, group.view, blocks, scale)
    return scored_by_rows(blocks, masses, len(group.own_blocks), config)
