"""Triton kernel of the exact rerank: sampled queries score forced and candidate blocks, the best are listed.

One program takes query blocks of a sibling group and reads each K block once for all of them. In decode,
where there are few groups, the list is split over programs and a second launch chooses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.triton.ranking import MAX_TILE, keep_best
from kvrelay_kernels.triton.select_groups import forced_range, locate_group
from kvrelay_kernels.triton.select_request import SelectRequest
from kvrelay_kernels.triton.tiles import FLOOR, find_sequence, load_rows
from kvrelay_kernels.triton.tuning import (
    next_power_of_2,
    num_persistent,
    num_splits,
    padded_head_dim,
    rerank_launch,
)

MAX_RERANK_ROWS = 64


def launch_rerank(request: SelectRequest, bounds: Tensor, candidates: Tensor, counts: Tensor) -> None:
    """Fill the request's lists from the candidates of its groups."""
    config, q = request.config, request.q
    sampled = next_power_of_2(config.sampled_queries * request.group)
    blocks_per_tile = max(1, min(next_power_of_2(request.siblings), MAX_RERANK_ROWS // sampled))
    rows = max(16, blocks_per_tile * sampled)
    tiles = -(-request.siblings // blocks_per_tile)
    work = candidates.shape[0] * tiles
    listed = config.num_candidates + config.sink_blocks + config.local_blocks + request.siblings
    capacity = -(-listed // 64) * 64
    splits = num_splits(work, max(1, listed // 4), q) if request.decode else 1
    columns = 2 + blocks_per_tile * (2 if config.by_peak else 1)
    scratch_bytes = 4 * capacity * (rows + columns)
    programs = num_persistent(work, scratch_bytes, q) if splits == 1 else work
    lists = torch.empty((programs, columns, capacity), dtype=torch.int32, device=q.device)
    logs = torch.empty((programs, capacity, rows), dtype=torch.float32, device=q.device)
    steps = [(True, True, 1)] if splits == 1 else [(True, False, splits), (False, True, 1)]
    for score, choose, width in steps:
        _rerank[(programs, width)](
            *_rerank_arguments(request, bounds, candidates, counts),
            lists,
            logs,
            work,
            **_rerank_constants(request, rows, blocks_per_tile, tiles, capacity),
            SCORE=score,
            CHOOSE=choose,
            **rerank_launch(q).options(),
        )


def _rerank_arguments(
    request: SelectRequest, bounds: Tensor, candidates: Tensor, counts: Tensor
) -> tuple[Tensor | int | float, ...]:
    kv, q = request.kv, request.q
    return (
        q,
        *q.stride(),
        kv.k_pages,
        *kv.k_pages.stride(),
        kv.block_table,
        *kv.block_table.stride(),
        kv.seq_lens.contiguous(),
        request.cu_seqlens_q,
        bounds,
        request.cu_q_blocks,
        candidates,
        counts,
        request.indices,
        request.counts,
        kv.batch,
        request.scale_log2,
        1.0 if request.config.top_p is None else request.config.top_p,
    )


def _rerank_constants(
    request: SelectRequest, rows: int, blocks_per_tile: int, tiles: int, capacity: int
) -> dict[str, int | bool]:
    kv, config = request.kv, request.config
    tile = min(MAX_TILE, next_power_of_2(capacity))
    return {
        "KV_HEADS": kv.num_kv_heads,
        "GROUP": request.group,
        "SIBLINGS": request.siblings,
        "SAMPLES": config.sampled_queries,
        "ROWS": rows,
        "QUERY_BLOCKS": blocks_per_tile,
        "QUERY_TILES": tiles,
        "DIM": kv.head_dim,
        "D": padded_head_dim(kv.head_dim),
        "CANDIDATES": config.num_candidates,
        "SINKS": config.sink_blocks,
        "LOCAL": config.local_blocks,
        "BUDGET": config.budget,
        "BUDGET_POW2": next_power_of_2(config.budget),
        "TOP_P": config.top_p is not None,
        "BY_PEAK": config.by_peak,
        "CAPACITY": capacity,
        "TILE": tile,
        "TILES": -(-capacity // tile),
        "BATCH_POW2": next_power_of_2(kv.batch + 1),
    }


@triton.jit
def _score_list(
    q, position, row_mask, k_base, k_page, k_token, k_dim, table, table_block, seq_len, candidates,
    sinks, found, recent, begin, end, blocks_ptr, logs_ptr, scale_log2,
    ROWS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Log (base 2) of every row's softmax numerator on list entries ``[begin, end)``, and their blocks."""
    row = tl.arange(0, ROWS)
    for entry in range(begin, end):
        candidate = (entry >= sinks) & (entry < sinks + found)
        block = tl.load(candidates + entry - sinks, mask=candidate, other=0)
        block = tl.where(candidate, block, tl.where(entry < sinks, entry, recent + entry - sinks - found))
        page = tl.load(table + block * table_block).to(tl.int64)
        key = block * 64 + tl.arange(0, 64)
        k = load_rows(k_base + page * k_page, k_token, k_dim, key < seq_len, 64, D, DIM)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        logits = tl.where(key[None, :] <= position[:, None], logits, float("-inf"))
        peak = tl.maximum(tl.max(logits, 1), FLOOR)
        log_mass = peak + tl.math.log2(tl.sum(tl.math.exp2(logits - peak[:, None]), 1))
        tl.store(logs_ptr + entry * ROWS + row, log_mass, mask=row_mask)
        tl.store(blocks_ptr + entry, block)


@triton.jit
def _mean_masses(
    logs_ptr, mass_ptr, peaks_ptr, count, row_mask, weight, ROWS: tl.constexpr, QUERY_BLOCKS: tl.constexpr,
    CAPACITY: tl.constexpr, ENTRIES: tl.constexpr, BY_PEAK: tl.constexpr,
):  # fmt: skip
    """Softmax over the list per row, mean over each query block's rows: ``mass [QUERY_BLOCKS, count]``.

    ``peaks``, of that shape, get the largest in place of the mean, to a factor that all blocks share.
    """
    row = tl.arange(0, ROWS)
    peak = tl.full([ROWS], FLOOR, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, count, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        mask = (entry < count)[:, None] & row_mask[None, :]
        logs = tl.load(logs_ptr + entry[:, None] * ROWS + row[None, :], mask=mask, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logs, 0))
        total = total * tl.math.exp2(peak - new_peak) + tl.sum(tl.math.exp2(logs - new_peak[None, :]), 0)
        peak = new_peak
    weight = weight / tl.where(total > 0, total, 1.0)
    for start in range(0, count, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        mask = (entry < count)[:, None] & row_mask[None, :]
        logs = tl.load(logs_ptr + entry[:, None] * ROWS + row[None, :], mask=mask, other=float("-inf"))
        shares = tl.math.exp2(logs - peak[None, :]) * weight[None, :]
        by_block = tl.reshape(shares, [ENTRIES, QUERY_BLOCKS, ROWS // QUERY_BLOCKS])
        query_block = tl.arange(0, QUERY_BLOCKS)
        offsets = query_block[None, :] * CAPACITY + entry[:, None]
        inside = (entry < count)[:, None] & (query_block >= 0)[None, :]
        tl.store(mass_ptr + offsets, tl.sum(by_block, 2).to(tl.int32, bitcast=True), mask=inside)
        if BY_PEAK:
            tl.store(peaks_ptr + offsets, tl.max(by_block, 2).to(tl.int32, bitcast=True), mask=inside)
    tl.debug_barrier()


@triton.jit
def _rerank(
    q_ptr, q_row, q_head, q_dim, k_ptr, k_page, k_head, k_token, k_dim,
    table_ptr, table_seq, table_block, lens_ptr, cu_ptr, bounds_ptr, cu_blocks_ptr,
    candidates_ptr, found_ptr, indices_ptr, counts_ptr, batch, scale_log2, top_p, lists_ptr, logs_ptr, work,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIBLINGS: tl.constexpr, SAMPLES: tl.constexpr,
    ROWS: tl.constexpr, QUERY_BLOCKS: tl.constexpr, QUERY_TILES: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, CANDIDATES: tl.constexpr, SINKS: tl.constexpr, LOCAL: tl.constexpr,
    BUDGET: tl.constexpr, BUDGET_POW2: tl.constexpr, TOP_P: tl.constexpr, CAPACITY: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, BATCH_POW2: tl.constexpr,
    BY_PEAK: tl.constexpr, SCORE: tl.constexpr, CHOOSE: tl.constexpr,
):  # fmt: skip
    rows_each: tl.constexpr = ROWS // QUERY_BLOCKS
    program = tl.program_id(0).to(tl.int64)
    columns: tl.constexpr = 2 + 2 * QUERY_BLOCKS if BY_PEAK else 2 + QUERY_BLOCKS
    blocks = lists_ptr + program * (columns * CAPACITY)
    bits = blocks + CAPACITY
    mass = bits + CAPACITY
    ranks = mass + QUERY_BLOCKS * CAPACITY if BY_PEAK else mass
    logs = logs_ptr + program * (CAPACITY * ROWS)
    row = tl.arange(0, ROWS)
    for work_item in range(tl.program_id(0), work, tl.num_programs(0)):
        item = tl.cast(work_item, tl.int32)  # the interpreter counts in Python integers
        tile = item % QUERY_TILES
        kv_head = item // QUERY_TILES % KV_HEADS
        group = item // (QUERY_TILES * KV_HEADS)
        seq = find_sequence(bounds_ptr, group, batch, BATCH_POW2)
        if seq < batch:
            seq_len, frontier, first_position, stop, first_row = locate_group(
                group, seq, bounds_ptr, cu_ptr, lens_ptr, SIBLINGS
            )
            sinks, recent, end = forced_range(frontier, first_position, stop, SINKS, LOCAL)
            flat = group.to(tl.int64) * KV_HEADS + kv_head
            found = tl.load(found_ptr + flat)
            count = sinks + found + tl.maximum(end - recent, 0)
            first_block = tile * QUERY_BLOCKS
            start = (first_block + row // rows_each) * 64
            length = tl.minimum(tl.maximum(stop - first_position - start, 0), 64)
            row_mask = (row % rows_each < SAMPLES * GROUP) & (length > 0)
            if SCORE:
                sample = row % rows_each  # sample by sample, the heads of the group interleaved
                pick = start + (2 * sample + 1) * length // (2 * SAMPLES * GROUP)
                head = kv_head * GROUP + row % rows_each % GROUP
                q_rows = q_ptr + (first_row + pick).to(tl.int64) * q_row + head.to(tl.int64) * q_head
                dim = tl.arange(0, D)
                mask = row_mask[:, None] & (dim < DIM)[None, :]
                q = tl.load(q_rows[:, None] + dim[None, :] * q_dim, mask=mask, other=0.0)
                share = (count + tl.num_programs(1) - 1) // tl.num_programs(1)
                begin = tl.program_id(1) * share
                _score_list(
                    q, first_position + pick, row_mask, k_ptr + kv_head.to(tl.int64) * k_head, k_page,
                    k_token, k_dim, table_ptr + seq.to(tl.int64) * table_seq, table_block, seq_len,
                    candidates_ptr + flat * CANDIDATES, sinks, found, recent, begin,
                    tl.minimum(begin + share, count), blocks, logs, scale_log2, ROWS, DIM, D,
                )  # fmt: skip
                tl.debug_barrier()
            if CHOOSE:
                weight = tl.where(row_mask, 1.0 / (SAMPLES * GROUP), 0.0)
                _mean_masses(
                    logs, mass, ranks, count, row_mask, weight, ROWS, QUERY_BLOCKS, CAPACITY, 16, BY_PEAK
                )
                first_own = first_position // 64
                first_slot = tl.load(cu_blocks_ptr + seq) + first_own - _first_block(seq, cu_ptr, lens_ptr)
                in_group = tl.maximum(end - first_own, 1)  # an empty sequence decodes to an empty list
                for which in range(tl.minimum(QUERY_BLOCKS, in_group - first_block)):
                    query_block = first_block + which
                    out = (first_slot + query_block).to(tl.int64) * KV_HEADS + kv_head
                    keep_best(
                        blocks, mass + which * CAPACITY, ranks + which * CAPACITY, bits, count,
                        first_own + query_block, top_p, indices_ptr + out * BUDGET, counts_ptr + out,
                        BUDGET, SINKS, LOCAL, TOP_P, TILE, TILES, BUDGET_POW2,
                    )  # fmt: skip


@triton.jit
def _first_block(seq, cu_ptr, lens_ptr):
    """Block of the first query row of a sequence."""
    q_len = tl.load(cu_ptr + seq + 1) - tl.load(cu_ptr + seq)
    return tl.maximum(tl.load(lens_ptr + seq) - q_len, 0) // 64
