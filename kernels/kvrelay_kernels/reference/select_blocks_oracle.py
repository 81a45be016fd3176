"""Selector ``oracle``: the exact attention mass of every block, what the others are measured against."""

import torch

from kvrelay_kernels.layout import BLOCK_SIZE
from kvrelay_kernels.reference.query_groups import QueryGroup, ScoredBlocks, block_masses, mean_over_rows
from kvrelay_kernels.selection import SelectionConfig


def oracle(group: QueryGroup, _config: SelectionConfig, scale: float) -> ScoredBlocks:
    """Softmax mass per block, averaged over the query block's rows and the heads of the GQA group.

    Quadratic in the sequence, streamed: one query block at a time holds ``[heads, 64 * group, n / 64]``.
    """
    last = int(group.own_blocks[-1])
    blocks = torch.arange(last + 1, device=group.q.device).expand(group.q.shape[1], -1)
    scores = []
    for picks in torch.split(torch.arange(group.q.shape[0], device=group.q.device), BLOCK_SIZE):
        rows, positions = group.rows(picks)
        scores.append(mean_over_rows(block_masses(rows, positions, group.view, blocks, scale), 1))
    return ScoredBlocks(blocks=blocks, scores=torch.cat(scores, dim=1))
