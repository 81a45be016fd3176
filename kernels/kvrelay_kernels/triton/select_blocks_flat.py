"""Triton kernels of selectors ``local``, ``mean_pool`` and ``quest``; see ``reference.select_blocks_flat``.

Baselines: the two that score read every page's statistics once per query block, quadratic in pages.
"""

import torch
import triton
import triton.language as tl

from kvrelay_kernels.errors import KernelUnavailable
from kvrelay_kernels.triton.ranking import MAX_TILE, NONE, keep_best
from kvrelay_kernels.triton.select_groups import locate_group, mean_queries, score_boxes
from kvrelay_kernels.triton.select_request import SelectRequest
from kvrelay_kernels.triton.tiles import find_sequence
from kvrelay_kernels.triton.tuning import next_power_of_2, num_persistent, padded_head_dim, scan_launch

NODES = 64


def local(request: SelectRequest) -> None:
    """Sinks and the most recent blocks."""
    if request.config.top_p is not None:
        raise KernelUnavailable("select_blocks: the triton kernel of selector 'local' has no top_p")
    slots, heads, budget = request.indices.shape
    if slots:
        _local[(slots,)](
            request.cu_q_blocks,
            request.cu_seqlens_q,
            request.kv.seq_lens.contiguous(),
            request.indices,
            request.counts,
            request.kv.batch,
            KV_HEADS=heads,
            BUDGET=budget,
            SINKS=request.config.sink_blocks,
            BUDGET_POW2=next_power_of_2(budget),
            BATCH_POW2=next_power_of_2(request.kv.batch + 1),
            num_warps=1,
        )


def mean_pool(request: SelectRequest) -> None:
    """Mean query against mean key of each page."""
    _score_all(request, ("mean", "mean"), boxes=False)


def quest(request: SelectRequest) -> None:
    """Mean query against the min/max box of each page."""
    _score_all(request, ("minimum", "maximum"), boxes=True)


def _score_all(request: SelectRequest, names: tuple[str, str], *, boxes: bool) -> None:
    kv, config, q = request.kv, request.config, request.q
    statistics = request.statistics(*names)
    rows = max(16, next_power_of_2(request.group))
    capacity = -(-(kv.block_table.shape[1] + 1) // NODES) * NODES
    tile = min(MAX_TILE, next_power_of_2(capacity))
    work = request.indices.shape[0] * kv.num_kv_heads
    if not work:
        return
    programs = num_persistent(work, 4 * capacity * (rows + 3), q)
    lists = torch.empty((programs, 3, capacity), dtype=torch.int32, device=q.device)
    bounds = torch.empty((programs, rows, capacity), dtype=torch.float32, device=q.device)
    _select_flat[(programs,)](
        q,
        *q.stride(),
        kv.block_table,
        *kv.block_table.stride(),
        kv.seq_lens.contiguous(),
        request.cu_seqlens_q,
        request.cu_q_blocks,
        *statistics,
        lists,
        bounds,
        request.indices,
        request.counts,
        kv.batch,
        work,
        request.scale_log2,
        1.0 if config.top_p is None else config.top_p,
        KV_HEADS=kv.num_kv_heads,
        GROUP=request.group,
        ROWS=rows,
        DIM=kv.head_dim,
        D=padded_head_dim(kv.head_dim),
        BOXES=boxes,
        CAPACITY=capacity,
        NODES=NODES,
        TILE=tile,
        TILES=-(-capacity // tile),
        BUDGET=config.budget,
        BUDGET_POW2=next_power_of_2(config.budget),
        SINKS=config.sink_blocks,
        LOCAL=config.local_blocks,
        TOP_P=config.top_p is not None,
        BATCH_POW2=next_power_of_2(kv.batch + 1),
        **scan_launch(q).options(),
    )


@triton.jit
def _local(
    bounds_ptr, cu_ptr, lens_ptr, indices_ptr, counts_ptr, batch,
    KV_HEADS: tl.constexpr, BUDGET: tl.constexpr, SINKS: tl.constexpr,
    BUDGET_POW2: tl.constexpr, BATCH_POW2: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    seq = find_sequence(bounds_ptr, slot, batch, BATCH_POW2)
    if seq >= batch:
        return
    seq_len, _, first_position, _, _ = locate_group(slot, seq, bounds_ptr, cu_ptr, lens_ptr, 1)
    visible = tl.where(seq_len > 0, first_position // 64 + 1, 0)
    count = tl.minimum(visible, BUDGET)
    entry = tl.arange(0, BUDGET_POW2)
    block = tl.where(entry < SINKS, entry, visible - count + entry)
    block = tl.where(entry < count, block, -1)
    for head in range(KV_HEADS):
        flat = slot.to(tl.int64) * KV_HEADS + head
        tl.store(indices_ptr + flat * BUDGET + entry, block, mask=entry < BUDGET)
        tl.store(counts_ptr + flat, count)


@triton.jit
def _select_flat(
    q_ptr, q_row, q_head, q_dim, table_ptr, table_seq, table_block, lens_ptr, cu_ptr, bounds_ptr,
    lower_ptr, lower_page, lower_head, lower_dim, upper_ptr, upper_page, upper_head, upper_dim,
    lists_ptr, scores_ptr, indices_ptr, counts_ptr, batch, work, scale_log2, top_p,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    BOXES: tl.constexpr, CAPACITY: tl.constexpr, NODES: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr, BUDGET: tl.constexpr, BUDGET_POW2: tl.constexpr, SINKS: tl.constexpr,
    LOCAL: tl.constexpr, TOP_P: tl.constexpr, BATCH_POW2: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = lists_ptr + program * (3 * CAPACITY)
    mass = blocks + CAPACITY
    ranks = mass + CAPACITY
    scores = scores_ptr + program * (ROWS * CAPACITY)
    for work_item in range(tl.program_id(0), work, tl.num_programs(0)):
        item = tl.cast(work_item, tl.int32)  # the interpreter counts in Python integers
        slot = item // KV_HEADS
        kv_head = item % KV_HEADS
        seq = find_sequence(bounds_ptr, slot, batch, BATCH_POW2)
        if seq < batch:
            seq_len, own, first_position, stop, first_row = locate_group(
                slot, seq, bounds_ptr, cu_ptr, lens_ptr, 1
            )
            pooled = mean_queries(
                q_ptr, q_row, q_head, q_dim, first_row, stop - first_position, kv_head, GROUP, ROWS, DIM, D
            )
            pooled = pooled * scale_log2
            dtype = lower_ptr.dtype.element_ty
            q_upper = tl.maximum(pooled, 0.0).to(dtype)
            if BOXES:
                q_lower = tl.minimum(pooled, 0.0).to(dtype)
            else:
                q_lower = pooled.to(dtype)
            count = tl.where(seq_len > 0, own + 1, 0)
            for start in range(0, count, TILE):
                index = start + tl.arange(0, TILE)
                tl.store(blocks + index, index, mask=index < count)
                tl.store(mass + index, tl.zeros([TILE], tl.int32), mask=index == own)
            tl.debug_barrier()
            score_boxes(
                q_upper, q_lower, GROUP, blocks, mass, scores, tl.minimum(own, count), 0, -1, own, 0, own,
                table_ptr + seq.to(tl.int64) * table_seq, table_block,
                lower_ptr + kv_head.to(tl.int64) * lower_head, lower_page, lower_dim,
                upper_ptr + kv_head.to(tl.int64) * upper_head, upper_page, upper_dim,
                NONE, BOXES, ROWS, DIM, D, CAPACITY, NODES,
            )  # fmt: skip
            flat = slot.to(tl.int64) * KV_HEADS + kv_head
            keep_best(
                blocks, mass, mass, ranks, count, own, top_p, indices_ptr + flat * BUDGET, counts_ptr + flat,
                BUDGET, SINKS, LOCAL, TOP_P, TILE, TILES, BUDGET_POW2,
            )  # fmt: skip
