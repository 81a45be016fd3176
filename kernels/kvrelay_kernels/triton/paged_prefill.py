"""Triton kernel of ``paged_prefill``: causal FlashAttention-2 (arXiv 2307.08691) over a paged cache.

The tile of ``block_sparse_prefill``, walking every page. Chunks may start anywhere, so the one or two last
pages of a tile are masked. Late query tiles, which read most, are launched first.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.layout import BLOCK_SIZE, PagedKV
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


def paged_prefill(q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.paged_prefill``."""
    check_supported("paged_prefill", q)
    out, lse = empty_outputs(q)
    group = q.shape[1] // kv.num_kv_heads
    heads = heads_per_tile(group, q)
    # two heads of 64 queries or one of 128: rows of one tile either way, where the dtype allows
    queries = BLOCK_SIZE if heads == 2 or prefill_launch(q, 128).num_warps == 4 else 2 * BLOCK_SIZE
    slots = num_tile_slots(q.shape[0], kv.batch, queries)
    if q.shape[0]:
        _paged_prefill[(slots * kv.num_kv_heads * (group // heads),)](
            q,
            *q.stride(),
            *paged_arguments(kv),
            cu_seqlens_q.contiguous(),
            query_tile_bounds(cu_seqlens_q.contiguous(), queries),
            out,
            lse,
            kv.batch,
            slots,
            scale * LOG2E.value,
            KV_HEADS=kv.num_kv_heads,
            GROUP=group,
            HEADS=heads,
            QUERIES=queries,
            DIM=kv.head_dim,
            D=padded_head_dim(kv.head_dim),
            BATCH_POW2=next_power_of_2(kv.batch + 1),
            **prefill_launch(q, queries * heads).options(),
        )
    return out, lse


@triton.jit
def _paged_prefill(
    q_ptr, q_row, q_head, q_dim,
    k_ptr, v_ptr, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim,
    table_ptr, table_seq, table_block, lens_ptr,
    cu_ptr, bounds_ptr, out_ptr, lse_ptr, batch, slots, scale_log2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, BATCH_POW2: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = GROUP // HEADS
    rows: tl.constexpr = QUERIES * HEADS
    program = tl.program_id(0)
    slot = slots - 1 - program // (tiles * KV_HEADS)
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
    acc = tl.zeros([rows, D], dtype=tl.float32)
    peak = tl.full([rows], FLOOR, dtype=tl.float32)
    total = tl.zeros([rows], dtype=tl.float32)

    whole = (position + 1) // 64  # pages that even the first row sees entirely
    last = tl.minimum(position + QUERIES, seq_len)
    page = tl.load(table, mask=whole > 0, other=0).to(tl.int64)
    for block in range(whole):
        k = load_page(k_base + page * k_page, k_token, k_dim, True, D, DIM)
        v = load_page(v_base + page * v_page, v_token, v_dim, True, D, DIM)
        acc, peak, total = step_whole(q, k, v, acc, peak, total, scale_log2, True)
        page = tl.load(table + (block + 1) * table_block, mask=block + 1 < whole, other=0).to(tl.int64)

    for block in range(whole, (last + 63) // 64):
        key = block * 64 + tl.arange(0, 64)
        page = tl.load(table + block * table_block).to(tl.int64)
        k = load_rows(k_base + page * k_page, k_token, k_dim, key < seq_len, 64, D, DIM)
        v = load_rows(v_base + page * v_page, v_token, v_dim, key < seq_len, 64, D, DIM)
        visible = key[None, :] <= (seq_len - q_len + query)[:, None]
        acc, peak, total = step_masked(q, k, v, acc, peak, total, scale_log2, visible)

    out, lse = finish(acc, peak, total)
    flat = (first_row + query).to(tl.int64) * (KV_HEADS * GROUP) + head
    store_rows(out_ptr, lse_ptr, out, lse, flat, row_mask, D, DIM)
