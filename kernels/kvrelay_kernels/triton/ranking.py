"""Device functions that keep the best entries of a list in scratch memory, in order and without sorting.

Scores are non-negative, so their bit patterns order like they do: the k-th largest is found by binary search
over 31 bits, and a running count of the kept entries compacts the list. Equal scores keep the list's order.

Scratch is written by some threads of a program and read by others: callers put a barrier between.
"""

import triton
import triton.language as tl

FORCED = tl.constexpr(2139095040)
"""Bits of float32 infinity: ranks above every score."""

NONE = tl.constexpr(-1)
"""Ranks below every score: not to be kept."""

MAX_TILE = 1024
"""Entries that a program ranks at a time."""


@triton.jit
def count_true(mask):
    """How many of ``mask`` are true. Summed in float32, exact below 2**24: of a sum of booleans the compiler
    makes a population count of bits that it gathers through the stack."""
    return tl.sum(tl.where(mask, 1.0, 0.0), 0).to(tl.int32)


@triton.jit
def kth_largest(bits_ptr, count, k, TILE: tl.constexpr, TILES: tl.constexpr):
    """Largest ``t >= 0`` that at least ``k`` of ``bits[:count]`` reach; 0 if fewer are scores at all."""
    index = tl.arange(0, TILE)
    found = tl.zeros([], dtype=tl.int32)
    if TILES == 1:
        bits = tl.load(bits_ptr + index, mask=index < count, other=-1)
        for step in range(31):
            candidate = found | (1 << (30 - step))
            reach = count_true(bits >= candidate)
            found = tl.where(reach >= k, candidate, found)
    else:
        for step in range(31):
            candidate = found | (1 << (30 - step))
            reach = count_above(bits_ptr, count, candidate - 1, TILE)
            found = tl.where(reach >= k, candidate, found)
    return found


@triton.jit
def count_above(bits_ptr, count, threshold, TILE: tl.constexpr):
    """How many of ``bits[:count]`` are greater than ``threshold``."""
    above = tl.zeros([], dtype=tl.int32)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        bits = tl.load(bits_ptr + index, mask=index < count, other=-1)
        above += count_true(bits > threshold)
    return above


@triton.jit
def mass_above(bits_ptr, mass_ptr, count, threshold, TILE: tl.constexpr):
    """Sum of ``mass[:count]`` where ``bits`` are greater than ``threshold``, forced entries left out."""
    mass = tl.zeros([], dtype=tl.float32)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        bits = tl.load(bits_ptr + index, mask=index < count, other=-1)
        share = tl.load(mass_ptr + index, mask=index < count, other=0)
        chosen = (bits > threshold) & (bits < FORCED)
        mass += tl.sum(tl.where(chosen, share, 0).to(tl.float32, bitcast=True), 0)
    return mass


@triton.jit
def score_limit(bits_ptr, mass_ptr, count, forced_mass, wanted_mass, TILE: tl.constexpr):
    """Smallest ``t >= 0`` such that forced entries and those with bits above ``t`` hold less than
    ``wanted_mass``."""
    limit = tl.full([], -1, dtype=tl.int32)
    for step in range(31):
        candidate = tl.maximum(limit, 0) | (1 << (30 - step))
        enough = forced_mass + mass_above(bits_ptr, mass_ptr, count, candidate, TILE) >= wanted_mass
        limit = tl.where(enough, candidate, limit)
    at_zero = forced_mass + mass_above(bits_ptr, mass_ptr, count, 0, TILE) >= wanted_mass
    return tl.where((limit < 0) & at_zero, 0, limit) + 1


@triton.jit
def kept_of_tile(bits, threshold, room, ties):
    """Entries of a tile above ``threshold``, and those equal to it while fewer than ``room`` came before."""
    tie = (bits == threshold).to(tl.int32)
    tie_rank = ties + tl.cumsum(tie, 0) - tie
    keep = (bits > threshold) | ((bits == threshold) & (tie_rank < room))
    return keep, ties + count_true(bits == threshold)


@triton.jit
def keep_best(
    blocks_ptr, mass_ptr, rank_ptr, bits_ptr, count, own, top_p, out_ptr, kept_ptr,
    BUDGET: tl.constexpr, SINKS: tl.constexpr, LOCAL: tl.constexpr, TOP_P: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, BUDGET_POW2: tl.constexpr,
):  # fmt: skip
    """Write the final list of one query block: forced blocks, then by rank, ascending, then -1.

    blocks: ``[count]`` ascending; mass: ``[count]`` bits of float32 shares, which ``top_p`` adds up; rank:
    ``[count]`` bits of the float32 that orders them, often ``mass`` itself; bits: ``[count]`` scratch.
    """
    all_mass = tl.zeros([], dtype=tl.float32)
    forced_mass = tl.zeros([], dtype=tl.float32)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        inside = index < count
        block = tl.load(blocks_ptr + index, mask=inside, other=0)
        rank = tl.load(rank_ptr + index, mask=inside, other=0)
        visible = inside & (block <= own)
        forced = visible & ((block < SINKS) | (block > own - LOCAL))
        tl.store(bits_ptr + index, tl.where(forced, FORCED, tl.where(visible, rank, NONE)), mask=inside)
        if TOP_P:
            mass = tl.load(mass_ptr + index, mask=inside, other=0).to(tl.float32, bitcast=True)
            all_mass += tl.sum(tl.where(visible, mass, 0.0), 0)
            forced_mass += tl.sum(tl.where(forced, mass, 0.0), 0)
    tl.debug_barrier()
    threshold = kth_largest(bits_ptr, count, BUDGET, TILE, TILES)
    room = BUDGET - count_above(bits_ptr, count, threshold, TILE)
    limit = tl.zeros([], dtype=tl.int32)
    wanted = top_p * tl.maximum(all_mass, 1e-30)
    above_limit = tl.zeros([], dtype=tl.float32)
    if TOP_P:
        limit = score_limit(bits_ptr, mass_ptr, count, forced_mass, wanted, TILE)
        above_limit = forced_mass + mass_above(bits_ptr, mass_ptr, count, limit, TILE)
    kept = tl.zeros([], dtype=tl.int32)
    ties = tl.zeros([], dtype=tl.int32)
    tied_mass = tl.zeros([], dtype=tl.float32)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        bits = tl.load(bits_ptr + index, mask=index < count, other=-1)
        block = tl.load(blocks_ptr + index, mask=index < count, other=-1)
        keep, ties = kept_of_tile(bits, threshold, room, ties)
        if TOP_P:
            share = tl.load(mass_ptr + index, mask=index < count, other=0)
            tied = tl.where(bits == limit, share, 0).to(tl.float32, bitcast=True)
            before = above_limit + tied_mass + tl.cumsum(tied, 0) - tied
            keep = keep & ((bits > limit) | ((bits == limit) & (before < wanted)))
            tied_mass += tl.sum(tied, 0)
        chosen = keep.to(tl.int32)
        tl.store(out_ptr + kept + tl.cumsum(chosen, 0) - chosen, block, mask=keep)
        kept += count_true(keep)
    entry = tl.arange(0, BUDGET_POW2)
    tl.store(out_ptr + entry, tl.full([BUDGET_POW2], -1, tl.int32), mask=(entry >= kept) & (entry < BUDGET))
    tl.store(kept_ptr, kept)
    tl.debug_barrier()
