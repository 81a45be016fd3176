"""Attention of a few query rows over listed KV blocks: the arithmetic under all four attention operations."""

import torch
from torch import Tensor

from kvrelay_kernels.layout import BLOCK_SIZE
from kvrelay_kernels.reference.sequences import Chunk, SequenceView, compute_dtype

TILE_ROWS = 256


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """What rows without any key give: ``out`` zero like ``q``, ``lse`` ``[rows, heads]`` minus infinity."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.full(q.shape[:2], -torch.inf, dtype=compute_dtype(q.dtype), device=q.device)


def attend_rows(
    q: Tensor, first_position: int, view: SequenceView, blocks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention of ``q [rows, num_q_heads, head_dim]`` over ``blocks [num_kv_heads, n]``.

    ``blocks`` are logical, -1 is skipped, any order. Row ``i`` sits at ``first_position + i`` and sees keys
    at or before itself. Returns ``out`` like ``q`` and ``lse [rows, num_q_heads]`` (natural log of the sum of
    ``exp(scale * q.k)``). A row without keys gives 0 and minus infinity.
    """
    rows, num_q_heads, head_dim = q.shape
    heads = blocks.shape[0]
    grouped = (
        q.to(compute_dtype(q.dtype)).reshape(rows, heads, -1, head_dim).permute(1, 2, 0, 3)
    )  # [H, G, rows, d]
    keys = view.keys(blocks).flatten(1, 2)[:, None]
    visible = visible_keys(blocks, first_position, rows)[:, None]  # [H, 1, rows, n * 64]
    logits = (grouped @ keys.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().masked_fill(~visible, 0.0)
    # a slot no row sees may hold NaN, and 0 * NaN is NaN
    values = view.values(blocks).flatten(1, 2).masked_fill(~visible.any(2).squeeze(1)[..., None], 0.0)
    out = (weights @ values[:, None]).permute(2, 0, 1, 3).reshape(q.shape)
    return out.to(q.dtype), lse.permute(2, 0, 1).reshape(rows, num_q_heads)


def visible_keys(blocks: Tensor, first_position: int, rows: int) -> Tensor:
    """Which keys of ``blocks [heads, n]`` (-1: none) each row sees, ``[heads, rows, n * 64]`` bool."""
    slots = torch.arange(BLOCK_SIZE, device=blocks.device)
    positions = (blocks[..., None] * BLOCK_SIZE + slots).masked_fill((blocks < 0)[..., None], 2**62)
    query = first_position + torch.arange(rows, device=blocks.device)
    return positions.flatten(1)[:, None] <= query[:, None]


def attend_dense(q: Tensor, chunk: Chunk, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of a chunk's rows over its whole sequence, ``TILE_ROWS`` rows at a time."""
    out, lse = empty_outputs(q)
    for start in range(0, chunk.q_len, TILE_ROWS):
        stop = min(start + TILE_ROWS, chunk.q_len)
        last_block = (chunk.offset + stop - 1) // BLOCK_SIZE
        blocks = torch.arange(last_block + 1, device=q.device).expand(chunk.view.kv.num_kv_heads, -1)
        rows = q[start:stop]
        out[start:stop], lse[start:stop] = attend_rows(rows, chunk.offset + start, chunk.view, blocks, scale)
    return out, lse
