"""Which work item belongs to which sequence, computed on the device so that the host never waits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.layout import BLOCK_SIZE
from kvrelay_kernels.triton.tuning import next_power_of_2


def query_tile_bounds(cu_seqlens_q: Tensor, tile: int = BLOCK_SIZE) -> Tensor:
    """First tile of ``tile`` query rows of every sequence, ``[batch + 1]`` int32."""
    batch = cu_seqlens_q.shape[0] - 1
    bounds = torch.empty_like(cu_seqlens_q, memory_format=torch.contiguous_format)
    batch_pow2 = next_power_of_2(batch + 1)
    _tile_bounds[(1,)](
        cu_seqlens_q, cu_seqlens_q, bounds, batch, TILE=tile, ALIGNED=False, BATCH_POW2=batch_pow2
    )
    return bounds


def sibling_group_bounds(cu_seqlens_q: Tensor, seq_lens: Tensor, siblings: int) -> Tensor:
    """First sibling group of every sequence, ``[batch + 1]`` int32; groups lie at absolute positions."""
    batch = cu_seqlens_q.shape[0] - 1
    bounds = torch.empty_like(cu_seqlens_q, memory_format=torch.contiguous_format)
    tile, batch_pow2 = siblings * BLOCK_SIZE, next_power_of_2(batch + 1)
    _tile_bounds[(1,)](cu_seqlens_q, seq_lens, bounds, batch, TILE=tile, ALIGNED=True, BATCH_POW2=batch_pow2)
    return bounds


def num_tile_slots(total_q: int, batch: int, tile: int) -> int:
    """Most tiles of ``tile`` rows that ``total_q`` rows of ``batch`` sequences can make."""
    return (total_q + (tile - 1) * batch) // tile


def num_group_slots(total_q: int, batch: int, siblings: int) -> int:
    """Most sibling groups that ``total_q`` rows can touch; a chunk may start at any block of a group."""
    width = siblings * BLOCK_SIZE
    return (total_q + (2 * width - BLOCK_SIZE - 1) * batch) // width


@triton.jit
def _tile_bounds(
    cu_ptr, lens_ptr, bounds_ptr, batch, TILE: tl.constexpr, ALIGNED: tl.constexpr, BATCH_POW2: tl.constexpr
):
    index = tl.arange(0, BATCH_POW2)
    inside = index < batch
    q_len = tl.load(cu_ptr + index + 1, mask=inside, other=0) - tl.load(cu_ptr + index, mask=inside, other=0)
    start = tl.zeros([BATCH_POW2], dtype=tl.int32)
    if ALIGNED:
        start = tl.maximum(tl.load(lens_ptr + index, mask=inside, other=0) - q_len, 0)
    tiles = tl.where(q_len > 0, (start + q_len + TILE - 1) // TILE - start // TILE, 0)
    tl.store(bounds_ptr + index + 1, tl.cumsum(tiles, 0), mask=inside)
    tl.store(bounds_ptr + index, 0, mask=index == 0)
