"""Triton kernel of ``block_sparse_prefill``: dense attention whose KV block index comes from a list.

A program takes 64 queries of one or two query heads (64 or 128 rows) and walks the list of their query block.
Listed blocks before the own one are seen by every row, so only the own block is masked. Tiling and online
softmax: FlashAttention-2 (arXiv 2307.08691).
"""

import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection
from kvrelay_kernels.triton.arguments import check_supported, empty_outputs, paged_arguments
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


def block_sparse_prefill(
    q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.block_sparse_prefill``."""
    check_supported("block_sparse_prefill", q)
    out, lse = empty_outputs(q)
    group = q.shape[1] // kv.num_kv_heads
    heads = heads_per_tile(group, q)
    programs = selection.indices.shape[0] * kv.num_kv_heads * (group // heads)
    if programs:
        _block_sparse_prefill[(programs,)](
            q,
            *q.stride(),
            *paged_arguments(kv),
            cu_seqlens_q.contiguous(),
            selection.indices,
            *selection.indices.stride(),
            selection.counts,
            *selection.counts.stride(),
            selection.cu_q_blocks.contiguous(),
            out,
            lse,
            kv.batch,
            scale * LOG2E.value,
            KV_HEADS=kv.num_kv_heads,
            GROUP=group,
            HEADS=heads,
            DIM=kv.head_dim,
            D=padded_head_dim(kv.head_dim),
            BATCH_POW2=next_power_of_2(kv.batch + 1),
            **prefill_launch(q, 64 * heads).options(),
        )
    return out, lse


@triton.jit
def _block_sparse_prefill(
    q_ptr, q_row, q_head, q_dim,
    k_ptr, v_ptr, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim,
    table_ptr, table_seq, table_block, lens_ptr,
    cu_ptr, indices_ptr, index_slot, index_head, index_entry, counts_ptr, count_slot, count_head, bounds_ptr,
    out_ptr, lse_ptr, batch, scale_log2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, BATCH_POW2: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = GROUP // HEADS
    rows: tl.constexpr = 64 * HEADS
    program = tl.program_id(0)
    slot = program // (tiles * KV_HEADS)
    kv_head = program // tiles % KV_HEADS
    seq = find_sequence(bounds_ptr, slot, batch, BATCH_POW2)
    if seq >= batch:
        return
    first_row = tl.load(cu_ptr + seq)
    q_len = tl.load(cu_ptr + seq + 1) - first_row
    seq_len = tl.load(lens_ptr + seq)
    block = slot - tl.load(bounds_ptr + seq)
    own = (seq_len - q_len) // 64 + block

    row = tl.arange(0, rows)
    query = block * 64 + row % 64
    head = kv_head * GROUP + program % tiles * HEADS + row // 64
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
    count = tl.load(counts_ptr + slot * count_slot + kv_head * count_head)
    acc = tl.zeros([rows, D], dtype=tl.float32)
    peak = tl.full([rows], FLOOR, dtype=tl.float32)
    total = tl.zeros([rows], dtype=tl.float32)

    has_own = False
    listed = tl.load(entries, mask=count > 0, other=-1)
    taken = (listed >= 0) & (listed < own)
    page = tl.load(table + listed * table_block, mask=taken, other=0).to(tl.int64)
    for entry in range(count):
        has_own = has_own | (listed == own)
        k = load_page(k_base + page * k_page, k_token, k_dim, taken, D, DIM)
        v = load_page(v_base + page * v_page, v_token, v_dim, taken, D, DIM)
        acc, peak, total = step_whole(q, k, v, acc, peak, total, scale_log2, taken)
        # the next entry's two dependent loads start before this tile is done
        listed = tl.load(entries + (entry + 1) * index_entry, mask=entry + 1 < count, other=-1)
        taken = (listed >= 0) & (listed < own)
        page = tl.load(table + listed * table_block, mask=taken, other=0).to(tl.int64)

    if has_own:
        key = own * 64 + tl.arange(0, 64)
        page = tl.load(table + own * table_block).to(tl.int64)
        k = load_rows(k_base + page * k_page, k_token, k_dim, key < seq_len, 64, D, DIM)
        v = load_rows(v_base + page * v_page, v_token, v_dim, key < seq_len, 64, D, DIM)
        visible = key[None, :] <= (seq_len - q_len + query)[:, None]
        acc, peak, total = step_masked(q, k, v, acc, peak, total, scale_log2, visible)

    out, lse = finish(acc, peak, total)
    flat = (first_row + query).to(tl.int64) * (KV_HEADS * GROUP) + head
    store_rows(out_ptr, lse_ptr, out, lse, flat, row_mask, D, DIM)
