"""Selector ``oracle``: the exact attention mass of every block, what the others are measured against."""

import torch

from kvrelay_kernels.layout import BLOCK_SIZE
from kvrelay_kernels.reference.query_groups import QueryGroup, ScoredBlocks, block_masses, scored_by_rows
from kvrelay_kernels.selection import SelectionConfig


def oracle(group: QueryGroup, config: SelectionConfig, scale: float) -> ScoredBlocks:
    """Softmax mass per block, the mean (and peak) over the query block's rows and the heads of the GQA group.

    Quadratic in the sequence, streamed: one query block at a time holds ``[heads, 64 * group, n / 64]``.
    """
    last = int(group.own_blocks[-1])
    blocks = torch.arange(last + 1, device=group.q.device).expand(group.q.shape[1], -1)
    scored = []
    for picks in torch.split(torch.arange(group.q.shape[0], device=group.q.device), BLOCK_SIZE):
        rows, positions = group.rows(picks)
        masses = block_masses(rows, positions, group.view, blocks, scale)
        scored.append(scored_by_rows(blocks, masses, 1, config))
    ranks = [own.ranks for own in scored if own.ranks is not None]
    return ScoredBlocks(
        blocks=blocks,
        scores=torch.cat([own.scores for own in scored], dim=1),
        ranks=torch.cat(ranks, dim=1) if ranks else None,
    )
