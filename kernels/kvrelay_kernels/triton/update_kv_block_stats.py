"""Triton kernels of ``update_kv_block_stats``: pages in parallel, then the tree bottom-up.

The tree kernel splits over channels, which do not interact, and walks its levels inside one program: two
launches in all, however many levels and new tokens.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.layout import HOME_OFFSETS, PagedKV
from kvrelay_kernels.stats import KVBlockStats
from kvrelay_kernels.triton.arguments import check_supported
from kvrelay_kernels.triton.tiles import load_page
from kvrelay_kernels.triton.tuning import num_processors, padded_head_dim

PACKED_HOMES = sum((offset + 1) << (4 * level) for level, offset in enumerate(HOME_OFFSETS))
"""``HOME_OFFSETS`` plus one, four bits a level, so that a kernel can look one up by a level it computes."""

TREE_CHANNELS = 16


def update_kv_block_stats(stats: KVBlockStats, kv: PagedKV, num_new_tokens: Tensor) -> None:
    """See ``kvrelay_kernels.api.update_kv_block_stats``."""
    check_supported("update_kv_block_stats", kv.k_pages)
    max_blocks = kv.block_table.shape[1]
    rows = kv.batch * kv.num_kv_heads
    if not rows * max_blocks:
        return
    lengths = (
        kv.block_table,
        *kv.block_table.stride(),
        kv.seq_lens.contiguous(),
        num_new_tokens.contiguous(),
    )
    programs = max(1, min(max_blocks, -(-16 * num_processors(kv.k_pages) // rows)))
    _page_statistics[(rows, programs)](
        kv.k_pages,
        *kv.k_pages.stride(),
        *lengths,
        stats.mean,
        *stats.mean.stride(),
        stats.minimum,
        *stats.minimum.stride(),
        stats.maximum,
        *stats.maximum.stride(),
        stats.spread,
        *stats.spread.stride(),
        KV_HEADS=kv.num_kv_heads,
        DIM=kv.head_dim,
        D=padded_head_dim(kv.head_dim),
        num_warps=4,
    )
    _tree_boxes[(rows, -(-kv.head_dim // TREE_CHANNELS))](
        *lengths,
        stats.minimum,
        *stats.minimum.stride(),
        stats.maximum,
        *stats.maximum.stride(),
        stats.coarse_minimum,
        *stats.coarse_minimum.stride(),
        stats.coarse_maximum,
        *stats.coarse_maximum.stride(),
        PACKED_HOMES,
        KV_HEADS=kv.num_kv_heads,
        DIM=kv.head_dim,
        CHANNELS=TREE_CHANNELS,
        LEVELS=len(HOME_OFFSETS),
        NODES=64,
        num_warps=4,
    )


@triton.jit
def completed_pages(lens_ptr, new_ptr, seq):
    """Pages ``[first, end)`` of a sequence that its last new tokens completed."""
    seq_len = tl.load(lens_ptr + seq)
    first = tl.maximum(seq_len - tl.load(new_ptr + seq), 0) // 64
    return first, seq_len // 64


@triton.jit
def _page_statistics(
    k_ptr, k_page, k_head, k_token, k_dim,
    table_ptr, table_seq, table_block, lens_ptr, new_ptr,
    mean_ptr, mean_page, mean_head, mean_dim,
    min_ptr, min_page, min_head, min_dim,
    max_ptr, max_page, max_head, max_dim,
    spread_ptr, spread_page, spread_head,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0) // KV_HEADS
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    first, end = completed_pages(lens_ptr, new_ptr, seq)
    dim = tl.arange(0, D)
    inside = dim < DIM
    for block in range(first + tl.program_id(1), end, tl.num_programs(1)):
        page = tl.load(table_ptr + seq.to(tl.int64) * table_seq + block * table_block).to(tl.int64)
        keys = load_page(k_ptr + page * k_page + head * k_head, k_token, k_dim, True, D, DIM)
        lower = tl.min(keys, 0)
        upper = tl.max(keys, 0)
        mean = tl.sum(keys.to(tl.float32), 0) / 64
        away = keys.to(tl.float32) - mean[None, :]
        spread = tl.sqrt(tl.sum(tl.sum(away * away, 1), 0) / 64)
        tl.store(
            mean_ptr + page * mean_page + head * mean_head + dim * mean_dim,
            mean.to(mean_ptr.dtype.element_ty),
            mask=inside,
        )
        tl.store(min_ptr + page * min_page + head * min_head + dim * min_dim, lower, mask=inside)
        tl.store(max_ptr + page * max_page + head * max_head + dim * max_dim, upper, mask=inside)
        spread_to = spread_ptr + page * spread_page + head * spread_head
        tl.store(spread_to, spread.to(spread_ptr.dtype.element_ty))


@triton.jit
def home_offset(packed, level):
    """``HOME_OFFSETS[level]`` out of ``PACKED_HOMES``."""
    return ((packed >> (4 * level)) & 15).to(tl.int32) - 1


@triton.jit
def _merge_children(
    fine_ptr, fine_page, fine_head, fine_dim, coarse_ptr, coarse_page, coarse_head, coarse_dim,
    table, table_block, head, dim, node, node_mask, child_shift, child_home, home, LOWEST: tl.constexpr,
):  # fmt: skip
    """Minimum (``LOWEST``) or maximum over the four children of each node, stored at the node's home page."""
    mask = node_mask[:, None] & (dim >= 0)[None, :]
    for child in tl.static_range(4):
        child_page = (((4 * node + child + 1) << child_shift) + child_home) * table_block
        page = tl.load(table + child_page, mask=node_mask, other=0).to(tl.int64)
        pointers = fine_ptr + page[:, None] * fine_page + head * fine_head + dim[None, :] * fine_dim
        value = tl.load(pointers, mask=mask, other=0.0)
        if child == 0:
            merged = value
        elif LOWEST:
            merged = tl.minimum(merged, value)
        else:
            merged = tl.maximum(merged, value)
    page = tl.load(table + home * table_block, mask=node_mask, other=0).to(tl.int64)
    pointers = coarse_ptr + page[:, None] * coarse_page + head * coarse_head + dim[None, :] * coarse_dim
    tl.store(pointers, merged, mask=mask)


@triton.jit
def _tree_boxes(
    table_ptr, table_seq, table_block, lens_ptr, new_ptr,
    min_ptr, min_page, min_head, min_dim,
    max_ptr, max_page, max_head, max_dim,
    cmin_ptr, cmin_page, cmin_head, cmin_dim,
    cmax_ptr, cmax_page, cmax_head, cmax_dim,
    packed_homes,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr,
    NODES: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0) // KV_HEADS
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    first, end = completed_pages(lens_ptr, new_ptr, seq)
    table = table_ptr + seq.to(tl.int64) * table_seq
    dim = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    dim = tl.where(dim < DIM, dim, DIM - 1)  # a surplus lane repeats the last channel
    for level in range(1, LEVELS):
        offset = home_offset(packed_homes, level)
        child_home = home_offset(packed_homes, level - 1)
        shift = 2 * level
        # nodes whose home, ((node + 1) << shift) + offset, is in [first, end)
        after_first = tl.maximum(first - offset, 0)
        begin = tl.maximum(((after_first + (1 << shift) - 1) >> shift) - 1, 0)
        stop = tl.maximum(end - 1 - offset, 0) >> shift
        for start in range(begin, stop, NODES):
            node = start + tl.arange(0, NODES)
            inside = node < stop
            home = ((node + 1) << shift) + offset
            if level == 1:
                _merge_children(
                    min_ptr, min_page, min_head, min_dim, cmin_ptr, cmin_page, cmin_head, cmin_dim, table,
                    table_block, head, dim, node, inside, shift - 2, child_home, home, True,
                )  # fmt: skip
                _merge_children(
                    max_ptr, max_page, max_head, max_dim, cmax_ptr, cmax_page, cmax_head, cmax_dim, table,
                    table_block, head, dim, node, inside, shift - 2, child_home, home, False,
                )  # fmt: skip
            else:
                _merge_children(
                    cmin_ptr, cmin_page, cmin_head, cmin_dim, cmin_ptr, cmin_page, cmin_head, cmin_dim, table,
                    table_block, head, dim, node, inside, shift - 2, child_home, home, True,
                )  # fmt: skip
                _merge_children(
                    cmax_ptr, cmax_page, cmax_head, cmax_dim, cmax_ptr, cmax_page, cmax_head, cmax_dim, table,
                    table_block, head, dim, node, inside, shift - 2, child_home, home, False,
                )  # fmt: skip
        tl.debug_barrier()  # the next level reads what other threads of this program wrote
