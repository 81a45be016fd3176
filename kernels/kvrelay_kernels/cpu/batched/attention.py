"""Attention of many query blocks at once in matrix products: the arithmetic under all four operations."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvrelay_kernels.layout import BLOCK_SIZE
from kvrelay_kernels.reference.attention_rows import empty_outputs
from kvrelay_kernels.reference.sequences import Chunk, SequenceView, compute_dtype

LOGITS_PER_BATCH = 8 << 20
"""Most logits held at a time, which bounds memory at about a hundred megabytes."""

ListsOf = Callable[[int, int], Tensor]


def attend_chunk(
    q: Tensor, chunk: Chunk, lists_of: ListsOf, list_width: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of a chunk's rows ``q [q_len, num_q_heads, head_dim]``, 64 rows a query block.

    ``lists_of(first, last)`` gives the blocks ``[last - first, num_kv_heads, n]`` of query blocks first to
    last (-1: none), with n at most ``list_width``.
    """
    out, lse = empty_outputs(q)
    at_once = max(1, LOGITS_PER_BATCH // (BLOCK_SIZE**2 * q.shape[1] * max(1, list_width)))
    whole = q.shape[0] // BLOCK_SIZE
    starts = [(first, min(first + at_once, whole)) for first in range(0, whole, at_once)]
    if q.shape[0] % BLOCK_SIZE:
        starts.append((whole, whole + 1))
    for first, last in starts:
        rows = slice(first * BLOCK_SIZE, last * BLOCK_SIZE)
        tiles = q[rows].reshape(last - first, -1, *q.shape[1:])
        positions = chunk.offset + torch.arange(first, last) * BLOCK_SIZE
        parts = _attend_tiles(tiles, positions, chunk.view, lists_of(first, last), scale)
        out[rows], lse[rows] = (part.flatten(0, 1) for part in parts)
    return out, lse


def dense_lists(chunk: Chunk) -> ListsOf:
    """Lists of every block up to the last one a query block sees."""

    def lists_of(_first: int, last: int) -> Tensor:
        end = min(chunk.offset + last * BLOCK_SIZE, chunk.view.num_tokens)
        blocks = torch.arange(-(-end // BLOCK_SIZE))
        return blocks.expand(last - _first, chunk.view.kv.num_kv_heads, -1)

    return lists_of


def _attend_tiles(
    q: Tensor, positions: Tensor, view: SequenceView, blocks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q ``[tiles, rows, num_q_heads, head_dim]`` from ``positions [tiles]`` on; blocks
    ``[tiles, heads, n]``."""
    tiles, rows, num_q_heads, head_dim = q.shape
    heads = blocks.shape[1]
    visible = _visible(blocks, positions, rows)  # [tiles, heads, rows, n * 64]
    grouped = (q.to(compute_dtype(q.dtype)) * scale).reshape(tiles, rows, heads, -1, head_dim)
    grouped = grouped.permute(0, 2, 3, 1, 4)  # [tiles, heads, group, rows, head_dim]
    keys, values = (_gather(pages, view, blocks) for pages in (view.kv.k_pages, view.kv.v_pages))
    logits = grouped.flatten(2, 3) @ keys.transpose(-1, -2)
    logits = logits.view(tiles, heads, -1, rows, logits.shape[-1]).masked_fill_(
        ~visible[:, :, None], -torch.inf
    )
    top = logits.amax(-1, keepdim=True) if logits.shape[-1] else logits.new_zeros(*logits.shape[:-1], 1)
    top = top.masked_fill_(top == -torch.inf, 0.0)  # a row without keys; a finite top makes its weights 0
    weights = logits.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    # a slot no row sees may hold NaN, and 0 * NaN is NaN
    values = values.masked_fill_(~visible.any(2)[..., None], 0.0)
    out = (weights.flatten(2, 3) @ values).view(*weights.shape[:-1], head_dim) / total.clamp(min=1e-30)
    lse = (top + total.log()).squeeze(-1)
    out = out.permute(0, 3, 1, 2, 4).reshape(q.shape).to(q.dtype)
    return out, lse.permute(0, 3, 1, 2).reshape(tiles, rows, num_q_heads)


def _gather(pages: Tensor, view: SequenceView, blocks: Tensor) -> Tensor:
    heads = torch.arange(blocks.shape[1])[:, None]
    tiles = pages[view.table[blocks.clamp(min=0)], heads]  # [tiles, heads, n, 64, head_dim]
    return tiles.to(compute_dtype(pages.dtype)).flatten(2, 3)


def _visible(blocks: Tensor, positions: Tensor, rows: int) -> Tensor:
    keys = (blocks[..., None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).masked_fill(
        (blocks < 0)[..., None], 2**62
    )
    queries = positions[:, None] + torch.arange(rows)
    return keys.flatten(2)[:, :, None] <= queries[:, None, :, None]
