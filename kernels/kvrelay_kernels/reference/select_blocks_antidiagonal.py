"""Selector ``antidiagonal``: scores a block by sums along its strided antidiagonals (XAttention)."""

import torch
from torch import Tensor

from kvrelay_kernels.layout import BLOCK_SIZE
from kvrelay_kernels.reference.query_groups import QueryGroup, ScoredBlocks, mean_over_rows
from kvrelay_kernels.selection import SelectionConfig

STRIDE = 8


def antidiagonal(group: QueryGroup, _config: SelectionConfig, scale: float) -> ScoredBlocks:
    """Query rows i against keys 7 - i within strides of 8, softmax, summed per block (arXiv 2503.16428,
    alg. 1).

    Reads every key. Rows a partial block lacks count as zero queries.
    """
    own = group.own_blocks
    blocks = torch.arange(int(own[-1]) + 1, device=group.q.device).expand(group.q.shape[1], -1)
    queries = _strided_queries(group)  # [H, m * 8 * G, 8 * d]
    rows = own.repeat_interleave(queries.shape[1] // len(own))
    parts = []
    for tile in torch.split(blocks, 64, dim=1):
        keys = group.view.keys(tile)
        keys = keys.reshape(*keys.shape[:2], -1, STRIDE, keys.shape[3]).flip(3).flatten(3)  # [H, n, 8, 8 * d]
        logits = (queries @ keys.flatten(1, 2).transpose(-1, -2)) * (scale / STRIDE)
        parts.append(logits.view(*logits.shape[:2], -1, BLOCK_SIZE // STRIDE).logsumexp(-1))
    # own blocks may be incomplete and are forced anyway
    hidden = blocks[:, None] >= rows[None, :, None]
    shares = torch.cat(parts, -1).masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return ScoredBlocks(blocks=blocks, scores=mean_over_rows(shares, len(own)))


def _strided_queries(group: QueryGroup) -> Tensor:
    missing = -group.q.shape[0] % BLOCK_SIZE
    padded = torch.nn.functional.pad(group.q, (0, 0, 0, 0, 0, 0, 0, missing))
    strided = padded.reshape(-1, STRIDE, *padded.shape[1:]).permute(2, 0, 3, 1, 4)  # [H, m * 8, G, 8, d]
    return strided.flatten(3).flatten(1, 2)
