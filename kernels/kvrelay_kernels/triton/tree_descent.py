"""Triton kernel of the walk down the tree of boxes, from a sibling group's mean queries to its candidates.

One program takes one sibling group and KV head at a time: level after level, bounds of the beam's children on
tensor cores, softmax, and a selection of the best without sorting.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.layout import HOME_OFFSETS
from kvrelay_kernels.triton.ranking import (
    FORCED,
    MAX_TILE,
    NONE,
    count_above,
    count_true,
    kept_of_tile,
    kth_largest,
)
from kvrelay_kernels.triton.select_groups import forced_range, locate_group, mean_queries, score_boxes
from kvrelay_kernels.triton.select_request import SelectRequest
from kvrelay_kernels.triton.tiles import find_sequence
from kvrelay_kernels.triton.tuning import next_power_of_2, num_persistent, padded_head_dim, scan_launch
from kvrelay_kernels.triton.update_kv_block_stats import PACKED_HOMES, home_offset

NODES = 64


def launch_descent(
    request: SelectRequest, bounds: Tensor, candidates: Tensor, counts: Tensor, *, descend: bool
) -> None:
    """Fill ``candidates [groups * kv_heads, num_candidates]`` and their ``counts``."""
    kv, config, q = request.kv, request.config, request.q
    statistics = request.statistics("minimum", "maximum", "coarse_minimum", "coarse_maximum")
    rows = max(16, next_power_of_2(request.siblings * request.group))
    widest = kv.block_table.shape[1] + 1
    if descend:
        widest = min(4 * (config.beam + 2), widest)
    capacity = -(-widest // NODES) * NODES
    tile = min(MAX_TILE, next_power_of_2(capacity))
    programs = num_persistent(candidates.shape[0], 4 * capacity * (rows + 3), q)
    lists = torch.empty((programs, 3, capacity), dtype=torch.int32, device=q.device)
    scores = torch.empty((programs, rows, capacity), dtype=torch.float32, device=q.device)
    _descend[(programs,)](
        q,
        *q.stride(),
        kv.block_table,
        *kv.block_table.stride(),
        kv.seq_lens.contiguous(),
        request.cu_seqlens_q,
        bounds,
        *statistics,
        lists,
        scores,
        candidates,
        counts,
        kv.batch,
        candidates.shape[0],
        request.scale_log2,
        PACKED_HOMES,
        KV_HEADS=kv.num_kv_heads,
        GROUP=request.group,
        SIBLINGS=request.siblings,
        ROWS=rows,
        DIM=kv.head_dim,
        D=padded_head_dim(kv.head_dim),
        LEVELS=len(HOME_OFFSETS) if descend else 1,
        BEAM=config.beam,
        CANDIDATES=config.num_candidates,
        SINKS=config.sink_blocks,
        LOCAL=config.local_blocks,
        CAPACITY=capacity,
        NODES=NODES,
        TILE=tile,
        TILES=-(-capacity // tile),
        BATCH_POW2=next_power_of_2(kv.batch + 1),
        **scan_launch(q).options(),
    )


@triton.jit
def _expand(
    nodes_ptr, next_ptr, bits_ptr, count, child_shift, frontier,
    BEAM: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the children, before ``frontier``, of the best ``BEAM`` nodes and of the forced ones."""
    k = BEAM + count_above(bits_ptr, count, FORCED - 1, TILE)
    threshold = kth_largest(bits_ptr, count, k, TILE, TILES)
    room = k - count_above(bits_ptr, count, threshold, TILE)
    kept = tl.zeros([], dtype=tl.int32)
    ties = tl.zeros([], dtype=tl.int32)
    children = tl.zeros([], dtype=tl.int32)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        bits = tl.load(bits_ptr + index, mask=index < count, other=-1)
        node = tl.load(nodes_ptr + index, mask=index < count, other=0)
        keep, ties = kept_of_tile(bits, threshold, room, ties)
        chosen = keep.to(tl.int32)
        position = kept + tl.cumsum(chosen, 0) - chosen
        for which in tl.static_range(4):
            child = 4 * node + which
            alive = keep & ((child << child_shift) < frontier)
            tl.store(next_ptr + 4 * position + which, child, mask=alive)
            children += count_true(alive)
        kept += count_true(keep)
    tl.debug_barrier()
    return children


@triton.jit
def _write_candidates(
    nodes_ptr, bits_ptr, count, out_ptr, count_ptr, CANDIDATES: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Write the best ``CANDIDATES`` pages, ascending, and how many there are."""
    threshold = kth_largest(bits_ptr, count, CANDIDATES, TILE, TILES)
    room = CANDIDATES - count_above(bits_ptr, count, threshold, TILE)
    kept = tl.zeros([], dtype=tl.int32)
    ties = tl.zeros([], dtype=tl.int32)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        bits = tl.load(bits_ptr + index, mask=index < count, other=-1)
        node = tl.load(nodes_ptr + index, mask=index < count, other=0)
        keep, ties = kept_of_tile(bits, threshold, room, ties)
        chosen = keep.to(tl.int32)
        tl.store(out_ptr + kept + tl.cumsum(chosen, 0) - chosen, node, mask=keep)
        kept += count_true(keep)
    tl.store(count_ptr, kept)
    tl.debug_barrier()


@triton.jit
def _descend(
    q_ptr, q_row, q_head, q_dim, table_ptr, table_seq, table_block, lens_ptr, cu_ptr, bounds_ptr,
    min_ptr, min_page, min_head, min_dim, max_ptr, max_page, max_head, max_dim,
    cmin_ptr, cmin_page, cmin_head, cmin_dim, cmax_ptr, cmax_page, cmax_head, cmax_dim,
    lists_ptr, scores_ptr, candidates_ptr, found_ptr, batch, work, scale_log2, packed_homes,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIBLINGS: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, LEVELS: tl.constexpr, BEAM: tl.constexpr,
    CANDIDATES: tl.constexpr, SINKS: tl.constexpr, LOCAL: tl.constexpr, CAPACITY: tl.constexpr,
    NODES: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BATCH_POW2: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    lists = lists_ptr + program * (3 * CAPACITY)
    bits = lists + 2 * CAPACITY
    scores = scores_ptr + program * (ROWS * CAPACITY)
    for work_item in range(tl.program_id(0), work, tl.num_programs(0)):
        item = tl.cast(work_item, tl.int32)  # the interpreter counts in Python integers
        group = item // KV_HEADS
        kv_head = item % KV_HEADS
        head = kv_head.to(tl.int64)
        seq = find_sequence(bounds_ptr, group, batch, BATCH_POW2)
        if seq < batch:
            _, frontier, first_position, stop, first_row = locate_group(
                group, seq, bounds_ptr, cu_ptr, lens_ptr, SIBLINGS
            )
            table = table_ptr + seq.to(tl.int64) * table_seq
            sinks, recent, _ = forced_range(frontier, first_position, stop, SINKS, LOCAL)
            num_rows = stop - first_position
            pooled = mean_queries(
                q_ptr, q_row, q_head, q_dim, first_row, num_rows, kv_head, GROUP, ROWS, DIM, D
            )
            pooled = pooled * scale_log2
            q_upper = tl.maximum(pooled, 0.0).to(min_ptr.dtype.element_ty)
            q_lower = tl.minimum(pooled, 0.0).to(min_ptr.dtype.element_ty)
            rows_used = (num_rows + 63) // 64 * GROUP

            level = tl.zeros([], dtype=tl.int32)
            for _ in range(LEVELS - 1):
                nodes_here = (frontier + (1 << (2 * level)) - 1) >> (2 * level)
                level += (nodes_here > BEAM).to(tl.int32)
            count = (frontier + (1 << (2 * level)) - 1) >> (2 * level)
            for start in range(0, count, TILE):
                index = start + tl.arange(0, TILE)
                tl.store(lists + index, index, mask=index < count)
            tl.debug_barrier()
            for step in range(level):
                here = level - step
                nodes = lists + (step % 2) * CAPACITY
                score_boxes(
                    q_upper, q_lower, rows_used, nodes, bits, scores, count, here,
                    home_offset(packed_homes, here), frontier, 0, frontier, table, table_block,
                    cmin_ptr + head * cmin_head, cmin_page, cmin_dim,
                    cmax_ptr + head * cmax_head, cmax_page, cmax_dim,
                    FORCED, True, ROWS, DIM, D, CAPACITY, NODES,
                )  # fmt: skip
                count = _expand(
                    nodes, lists + ((step + 1) % 2) * CAPACITY, bits, count, 2 * (here - 1), frontier,
                    BEAM, TILE, TILES,
                )  # fmt: skip
            pages = lists + (level % 2) * CAPACITY
            score_boxes(
                q_upper, q_lower, rows_used, pages, bits, scores, count, 0, -1, frontier, sinks, recent,
                table, table_block,
                min_ptr + head * min_head, min_page, min_dim, max_ptr + head * max_head, max_page, max_dim,
                NONE, True, ROWS, DIM, D, CAPACITY, NODES,
            )  # fmt: skip
            flat = item.to(tl.int64)
            _write_candidates(
                pages,
                bits,
                count,
                candidates_ptr + flat * CANDIDATES,
                found_ptr + flat,
                CANDIDATES,
                TILE,
                TILES,
            )
