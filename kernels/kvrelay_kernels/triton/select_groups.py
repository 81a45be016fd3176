"""Device functions of the selectors: where a sibling group lies, its forced blocks, scores of boxes."""

import triton
import triton.language as tl

from kvrelay_kernels.triton.tiles import FLOOR


@triton.jit
def locate_group(group, seq, bounds_ptr, cu_ptr, lens_ptr, SIBLINGS: tl.constexpr):
    """``(seq_len, frontier, first_position, stop, first_row)`` of sibling group ``group`` of ``seq``.

    Positions ``[first_position, stop)`` are its queries, from row ``first_row`` of q on; none if the sequence
    is empty.
    """
    first_row = tl.load(cu_ptr + seq)
    seq_len = tl.load(lens_ptr + seq)
    offset = tl.maximum(seq_len - (tl.load(cu_ptr + seq + 1) - first_row), 0)
    frontier = (offset // (SIBLINGS * 64) + group - tl.load(bounds_ptr + seq)) * SIBLINGS
    first_position = tl.maximum(offset, frontier * 64)
    stop = tl.minimum((frontier + SIBLINGS) * 64, seq_len)
    return seq_len, frontier, first_position, stop, first_row + first_position - offset


@triton.jit
def forced_range(frontier, first_position, stop, SINKS: tl.constexpr, LOCAL: tl.constexpr):
    """``(sinks, recent, end)``: blocks ``[0, sinks)`` and ``[recent, end)`` are forced for some sibling."""
    end = tl.where(stop > first_position, (stop + 63) // 64, 0)
    sinks = tl.minimum(SINKS, end)
    return sinks, tl.maximum(sinks, frontier - LOCAL + 1), end


@triton.jit
def mean_queries(
    q_ptr, q_row, q_head, q_dim, first_row, num_rows, kv_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Mean query of each block of 64 rows and head, ``[ROWS, D]`` float32, row ``block * GROUP + head``."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    start = row // GROUP * 64
    length = tl.minimum(tl.maximum(num_rows - start, 0), 64)
    head = kv_head * GROUP + row % GROUP
    base = q_ptr + (first_row + start).to(tl.int64) * q_row + head.to(tl.int64) * q_head
    total = tl.zeros([ROWS, D], dtype=tl.float32)
    for step in range(tl.minimum(num_rows, 64)):
        mask = (step < length)[:, None] & (dim < DIM)[None, :]
        pointers = base[:, None] + step * q_row + dim[None, :] * q_dim
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return total / tl.maximum(length, 1).to(tl.float32)[:, None]


@triton.jit
def score_boxes(
    q_upper, q_lower, rows_used, nodes_ptr, bits_ptr, bounds_ptr, count, level, home_offset, frontier,
    skip_below, skip_from, table, table_block,
    lower_ptr, lower_page, lower_dim, upper_ptr, upper_page, upper_dim,
    OTHERS: tl.constexpr, BOXES: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    CAPACITY: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Score ``nodes[:count]`` of a level: softmax of their bounds per query row, mean over rows, as bits.

    A node is scored if its home page lies before ``frontier`` and, at level 0, outside the skipped (forced)
    pages; the others get ``OTHERS``. Bounds: Quest (arXiv 2406.10774, eq. 2), or the product with the mean
    key when not ``BOXES``. bounds_ptr: ``[ROWS, CAPACITY]`` scratch.
    """
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    peak = tl.full([ROWS], FLOOR, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, count, NODES):
        index = start + tl.arange(0, NODES)
        node = tl.load(nodes_ptr + index, mask=index < count, other=-1)
        home = ((node + 1) << (2 * level)) + home_offset
        scored = (index < count) & (home < frontier) & (node >= skip_below) & (node < skip_from)
        page = tl.load(table + home * table_block, mask=scored, other=0).to(tl.int64)
        mask = scored[:, None] & (dim < DIM)[None, :]
        lower = tl.load(
            lower_ptr + page[:, None] * lower_page + dim[None, :] * lower_dim, mask=mask, other=0.0
        )
        bounds = tl.dot(q_lower, tl.trans(lower), input_precision="ieee")
        if BOXES:
            upper = tl.load(
                upper_ptr + page[:, None] * upper_page + dim[None, :] * upper_dim, mask=mask, other=0.0
            )
            bounds = tl.dot(q_upper, tl.trans(upper), bounds, input_precision="ieee")
        bounds = tl.where(scored[None, :], bounds, float("-inf"))
        pointers = bounds_ptr + row[:, None] * CAPACITY + index[None, :]
        tl.store(pointers, bounds, mask=(index < count)[None, :] & (row < rows_used)[:, None])
        new_peak = tl.maximum(peak, tl.max(bounds, 1))
        total = total * tl.math.exp2(peak - new_peak) + tl.sum(tl.math.exp2(bounds - new_peak[:, None]), 1)
        peak = new_peak
    tl.debug_barrier()
    weight = tl.where(row < rows_used, 1.0 / (tl.where(total > 0, total, 1.0) * rows_used), 0.0)
    for start in range(0, count, NODES):
        index = start + tl.arange(0, NODES)
        pointers = bounds_ptr + row[:, None] * CAPACITY + index[None, :]
        mask = (index < count)[None, :] & (row < rows_used)[:, None]
        bounds = tl.load(pointers, mask=mask, other=float("-inf"))
        share = tl.sum(tl.math.exp2(bounds - peak[:, None]) * weight[:, None], 0)
        scored = tl.max(bounds, 0) > float("-inf")
        tl.store(
            bits_ptr + index, tl.where(scored, share.to(tl.int32, bitcast=True), OTHERS), mask=index < count
        )
    tl.debug_barrier()
