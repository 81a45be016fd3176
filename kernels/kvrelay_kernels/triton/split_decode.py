"""Split-KV decode, dense and sparse: many programs share one query row, a second kernel merges them.

A program takes all query heads of one KV head (padded to 16 rows) and a share of the row's KV blocks: of
the whole sequence, or of its list. The number of splits depends on sizes that the host knows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection
from kvrelay_kernels.triton.arguments import check_supported, empty_outputs, paged_arguments
from kvrelay_kernels.triton.merge_attention_states import merge_into
from kvrelay_kernels.triton.tiles import (
    FLOOR,
    LOG2E,
    finish,
    load_page,
    load_rows,
    step_masked,
    step_whole,
    store_rows,
)
from kvrelay_kernels.triton.tuning import decode_launch, next_power_of_2, num_splits, padded_head_dim


def split_decode(
    operation: str, q: Tensor, kv: PagedKV, selection: BlockSelection | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [batch, num_q_heads, head_dim]`` over whole sequences, or over ``selection``."""
    check_supported(operation, q)
    out, lse = empty_outputs(q)
    if not kv.batch:
        return out, lse
    max_blocks = kv.block_table.shape[1] if selection is None else selection.indices.shape[2]
    splits = num_splits(kv.batch * kv.num_kv_heads, max_blocks, q)
    if splits == 1:
        _launch(q, kv, selection, scale, out[None], lse[None])
    else:
        parts = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        part_lses = torch.empty((splits, *q.shape[:2]), dtype=torch.float32, device=q.device)
        _launch(q, kv, selection, scale, parts, part_lses)
        merge_into(parts, part_lses, out, lse)
    return out, lse


def _launch(
    q: Tensor, kv: PagedKV, selection: BlockSelection | None, scale: float, outs: Tensor, lses: Tensor
) -> None:
    """Fill ``outs [splits, batch, num_q_heads, head_dim]`` and ``lses [splits, batch, num_q_heads]``."""
    group = q.shape[1] // kv.num_kv_heads
    indices = kv.block_table[:, None] if selection is None else selection.indices
    counts = kv.block_table if selection is None else selection.counts
    _split_decode[(kv.batch * kv.num_kv_heads, outs.shape[0])](
        q,
        *q.stride(),
        *paged_arguments(kv),
        indices,
        *indices.stride(),
        counts,
        *counts.stride(),
        outs,
        lses,
        kv.batch,
        scale * LOG2E.value,
        KV_HEADS=kv.num_kv_heads,
        GROUP=group,
        ROWS=max(16, next_power_of_2(group)),
        DIM=kv.head_dim,
        D=padded_head_dim(kv.head_dim),
        SPARSE=selection is not None,
        **decode_launch(q).options(),
    )


@triton.jit
def _split_decode(
    q_ptr, q_row, q_head, q_dim,
    k_ptr, v_ptr, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim,
    table_ptr, table_seq, table_block, lens_ptr,
    indices_ptr, index_slot, index_head, index_entry, counts_ptr, count_slot, count_head,
    outs_ptr, lses_ptr, batch, scale_log2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    seq_len = tl.load(lens_ptr + seq)
    whole = seq_len // 64  # blocks that need no mask
    count = (seq_len + 63) // 64
    if SPARSE:
        count = tl.load(counts_ptr + seq.to(tl.int64) * count_slot + kv_head * count_head)
    share = (count + tl.num_programs(1) - 1) // tl.num_programs(1)
    begin = split * share
    end = tl.minimum(begin + share, count)

    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    row_mask = row < GROUP
    dim = tl.arange(0, D)
    q_rows = q_ptr + seq.to(tl.int64) * q_row + head.to(tl.int64) * q_head
    q = tl.load(
        q_rows[:, None] + dim[None, :] * q_dim, mask=row_mask[:, None] & (dim < DIM)[None, :], other=0.0
    )
    k_base = k_ptr + kv_head.to(tl.int64) * k_head
    v_base = v_ptr + kv_head.to(tl.int64) * v_head
    table = table_ptr + seq.to(tl.int64) * table_seq
    entries = indices_ptr + seq.to(tl.int64) * index_slot + kv_head * index_head
    acc = tl.zeros([ROWS, D], dtype=tl.float32)
    peak = tl.full([ROWS], FLOOR, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)

    has_partial = False
    listed = begin
    if SPARSE:
        listed = tl.load(entries + begin * index_entry, mask=begin < end, other=-1)
    taken = (begin < end) & (listed >= 0) & (listed < whole)
    page = tl.load(table + listed * table_block, mask=taken, other=0).to(tl.int64)
    for entry in range(begin, end):
        has_partial = has_partial | ((listed == whole) & (seq_len % 64 > 0))
        k = load_page(k_base + page * k_page, k_token, k_dim, taken, D, DIM)
        v = load_page(v_base + page * v_page, v_token, v_dim, taken, D, DIM)
        acc, peak, total = step_whole(q, k, v, acc, peak, total, scale_log2, taken)
        if SPARSE:
            listed = tl.load(entries + (entry + 1) * index_entry, mask=entry + 1 < end, other=-1)
        else:
            listed = entry + 1
        taken = (entry + 1 < end) & (listed >= 0) & (listed < whole)
        page = tl.load(table + listed * table_block, mask=taken, other=0).to(tl.int64)

    if has_partial:
        key = whole * 64 + tl.arange(0, 64)
        page = tl.load(table + whole * table_block).to(tl.int64)
        k = load_rows(k_base + page * k_page, k_token, k_dim, key < seq_len, 64, D, DIM)
        v = load_rows(v_base + page * v_page, v_token, v_dim, key < seq_len, 64, D, DIM)
        visible = (key < seq_len)[None, :] & (row >= 0)[:, None]
        acc, peak, total = step_masked(q, k, v, acc, peak, total, scale_log2, visible)

    out, lse = finish(acc, peak, total)
    flat = (split.to(tl.int64) * batch + seq) * (KV_HEADS * GROUP) + head
    store_rows(outs_ptr, lses_ptr, out, lse, flat, row_mask, D, DIM)
