"""Prefill, dense and sparse: causal attention of a tile of queries, pages in order or from a list.

A tile is 64 queries of one or two query heads, or 128 of one: 64 or 128 rows. Sparse tiles are query blocks:
listed blocks before the own one are seen by every row, so only the own block is masked. Dense chunks may
start anywhere, so the one or two last pages of a tile are masked; late tiles, which read most, are launched
first. Tiling and online softmax: FlashAttention-2 (arXiv 2307.08691).
"""

import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.layout import BLOCK_SIZE, PagedKV
from kvrelay_kernels.selection import BlockSelection
from kvrelay_kernels.triton.arguments import check_supported, empty_outputs, paged_arguments
from kvrelay_kernels.triton.schedule import num_tile_slots, query_tile_bounds
from kvrelay_kernels.triton.tiles import (
    FLOOR,
    LOG2E,
    find_sequence,
    finish,
    load_page,
    load_rows,
    step_masked,
    step_whole,
    store_rows,
)
from kvrelay_kernels.triton.tuning import heads_per_tile, next_power_of_2, padded_head_dim, prefill_launch


def tiled_prefill(
    operation: str,
    q: Tensor,
    kv: PagedKV,
    cu_seqlens_q: Tensor,
    selection: BlockSelection | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [total_q, num_q_heads, head_dim]`` over every page, or over ``selection``."""
    check_supported(operation, q)
    out, lse = empty_outputs(q)
    if not q.shape[0]:
        return out, lse
    heads = heads_per_tile(q.shape[1] // kv.num_kv_heads, q)
    if selection is None:
        # two heads of 64 queries or one of 128: rows of one tile either way, where the dtype allows
        wide = heads == 1 and prefill_launch(q, 128).num_warps > 4
        queries = 2 * BLOCK_SIZE if wide else BLOCK_SIZE
        slots = num_tile_slots(q.shape[0], kv.batch, queries)
        bounds = query_tile_bounds(cu_seqlens_q.contiguous(), queries)
        lists = kv.block_table[:, None], kv.block_table  # not read
    else:
        queries, slots = BLOCK_SIZE, selection.indices.shape[0]
        bounds, lists = selection.cu_q_blocks.contiguous(), (selection.indices, selection.counts)
    tiles = slots * kv.num_kv_heads * (q.shape[1] // kv.num_kv_heads // heads)
    _tiled_prefill[(tiles,)](
        q,
        *q.stride(),
        *paged_arguments(kv),
        cu_seqlens_q.contiguous(),
        lists[0],
        *lists[0].stride(),
        lists[1],
        *lists[1].stride(),
        bounds,
        out,
        lse,
        kv.batch,
        slots,
        scale * LOG2E.value,
        KV_HEADS=kv.num_kv_heads,
        GROUP=q.shape[1] // kv.num_kv_heads,
        HEADS=heads,
        QUERIES=queries,
        DIM=kv.head_dim,
        D=padded_head_dim(kv.head_dim),
        SPARSE=selection is not None,
        BATCH_POW2=next_power_of_2(kv.batch + 1),
        **prefill_launch(q, queries * heads).options(),
    )
    return out, lse


@triton.jit
def _tiled_prefill(
    q_ptr, q_row, q_head, q_dim,
    k_ptr, v_ptr, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim,
    table_ptr, table_seq, table_block, lens_ptr,
    cu_ptr, indices_ptr, index_slot, index_head, index_entry, counts_ptr, count_slot, count_head, bounds_ptr,
    out_ptr, lse_ptr, batch, slots, scale_log2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, SPARSE: tl.constexpr, BATCH_POW2: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = GROUP // HEADS
    rows: tl.constexpr = QUERIES * HEADS
    program = tl.program_id(0)
    slot = program // (tiles * KV_HEADS)
    if not SPARSE:
        slot = slots - 1 - slot
    kv_head = program // tiles % KV_HEADS
    seq = find_sequence(bounds_ptr, slot, batch, BATCH_POW2)
    if seq >= batch:
        return
    first_row = tl.load(cu_ptr + seq)
    q_len = tl.load(cu_ptr + seq + 1) - first_row
    seq_len = tl.load(lens_ptr + seq)
    first_query = (slot - tl.load(bounds_ptr + seq)) * QUERIES
    position = seq_len - q_len + first_query

    row = tl.arange(0, rows)
    query = first_query + row % QUERIES
    head = kv_head * GROUP + program % tiles * HEADS + row // QUERIES
    row_mask = query < q_len
    dim = tl.arange(0, D)
    q_rows = q_ptr + (first_row + query).to(tl.int64) * q_row + head.to(tl.int64) * q_head
    q = tl.load(
        q_rows[:, None] + dim[None, :] * q_dim, mask=row_mask[:, None] & (dim < DIM)[None, :], other=0.0
    )

    k_base = k_ptr + kv_head.to(tl.int64) * k_head
    v_base = v_ptr + kv_head.to(tl.int64) * v_head
    table = table_ptr + seq.to(tl.int64) * table_seq
    entries = indices_ptr + slot.to(tl.int64) * index_slot + kv_head * index_head
    acc = tl.zeros([rows, D], dtype=tl.float32)
    peak = tl.full([rows], FLOOR, dtype=tl.float32)
    total = tl.zeros([rows], dtype=tl.float32)

    if SPARSE:
        whole = position // 64  # the own block
        count = tl.load(counts_ptr + slot * count_slot + kv_head * count_head)
        listed = tl.load(entries, mask=count > 0, other=-1)
        taken = (listed >= 0) & (listed < whole)
        end = whole  # of the masked blocks: one more if the list holds the own one
    else:
        whole = (position + 1) // 64  # pages that even the first row sees entirely
        count = whole
        listed = 0
        taken = count > 0
        end = (tl.minimum(position + QUERIES, seq_len) + 63) // 64
    page = tl.load(table + listed * table_block, mask=taken, other=0).to(tl.int64)
    for entry in range(count):
        if SPARSE:
            end = tl.where(listed == whole, whole + 1, end)
            k = load_page(k_base + page * k_page, k_token, k_dim, taken, D, DIM)
            v = load_page(v_base + page * v_page, v_token, v_dim, taken, D, DIM)
            acc, peak, total = step_whole(q, k, v, acc, peak, total, scale_log2, taken)
            # the next entry's two dependent loads start before this tile is done
            listed = tl.load(entries + (entry + 1) * index_entry, mask=entry + 1 < count, other=-1)
            taken = (listed >= 0) & (listed < whole)
        else:
            k = load_page(k_base + page * k_page, k_token, k_dim, True, D, DIM)
            v = load_page(v_base + page * v_page, v_token, v_dim, True, D, DIM)
            acc, peak, total = step_whole(q, k, v, acc, peak, total, scale_log2, True)
            listed = entry + 1
            taken = listed < count
        page = tl.load(table + listed * table_block, mask=taken, other=0).to(tl.int64)

    last_visible = seq_len - q_len + query
    if SPARSE:  # at most one, and a branch holds fewer registers than a loop
        if end > whole:
            acc, peak, total = _attend_masked(
                q, acc, peak, total, last_visible, whole, table, table_block, seq_len,
                k_base, k_page, k_token, k_dim, v_base, v_page, v_token, v_dim, scale_log2, D, DIM,
            )  # fmt: skip
    else:
        for block in range(whole, end):
            acc, peak, total = _attend_masked(
                q, acc, peak, total, last_visible, block, table, table_block, seq_len,
                k_base, k_page, k_token, k_dim, v_base, v_page, v_token, v_dim, scale_log2, D, DIM,
            )  # fmt: skip

    out, lse = finish(acc, peak, total)
    flat = (first_row + query).to(tl.int64) * (KV_HEADS * GROUP) + head
    store_rows(out_ptr, lse_ptr, out, lse, flat, row_mask, D, DIM)


@triton.jit
def _attend_masked(
    q, acc, peak, total, last_visible, block, table, table_block, seq_len,
    k_base, k_page, k_token, k_dim, v_base, v_page, v_token, v_dim, scale_log2,
    D: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One page of which row ``i`` sees the keys up to position ``last_visible[i]``."""
    key = block * 64 + tl.arange(0, 64)
    page = tl.load(table + block * table_block).to(tl.int64)
    k = load_rows(k_base + page * k_page, k_token, k_dim, key < seq_len, 64, D, DIM)
    v = load_rows(v_base + page * v_page, v_token, v_dim, key < seq_len, 64, D, DIM)
    visible = key[None, :] <= last_visible[:, None]
    return step_masked(q, k, v, acc, peak, total, scale_log2, visible)
