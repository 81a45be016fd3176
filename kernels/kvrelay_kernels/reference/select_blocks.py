"""Reference of ``select_blocks``: runs a selector over every sibling group and keeps the best blocks."""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from kvrelay_kernels.errors import InvalidArgument
from kvrelay_kernels.layout import BLOCK_SIZE, PagedKV, num_query_block_slots
from kvrelay_kernels.reference.query_groups import QueryGroup, ScoredBlocks, query_groups
from kvrelay_kernels.reference.sequences import Chunk, iterate_chunks
from kvrelay_kernels.selection import BlockSelection, SelectionConfig
from kvrelay_kernels.selectors import selector_location
from kvrelay_kernels.stats import KVBlockStats

Selector = Callable[[QueryGroup, SelectionConfig, float], ScoredBlocks]


def select_blocks(
    q: Tensor,
    kv: PagedKV,
    config: SelectionConfig,
    cu_seqlens_q: Tensor | None,
    stats: KVBlockStats | None,
    scale: float,
) -> BlockSelection:
    """See ``kvrelay_kernels.api.select_blocks``."""
    selector = _load(config.selector)
    selection = empty_selection(q, kv, config, cu_seqlens_q)
    decode = cu_seqlens_q is None
    for chunk in iterate_chunks(kv, cu_seqlens_q, q.shape[0], stats):
        if not decode:
            check_aligned(chunk)
        slot = int(selection.cu_q_blocks[chunk.sequence])
        rows = q[chunk.first_row : chunk.first_row + chunk.q_len]
        for group in query_groups(chunk, rows, 1 if decode else config.sibling_blocks):
            own = group.own_blocks
            chosen, count = keep_best(selector(group, config, scale), own, config)
            selection.indices[slot : slot + len(own)] = chosen
            selection.counts[slot : slot + len(own)] = count
            slot += len(own)
    return selection


def empty_selection(
    q: Tensor, kv: PagedKV, config: SelectionConfig, cu_seqlens_q: Tensor | None
) -> BlockSelection:
    """Empty lists of the right shape, to be filled; ``cu_q_blocks`` is final."""
    if cu_seqlens_q is None:
        slots = kv.batch
        bounds = torch.arange(kv.batch + 1, dtype=torch.int32, device=q.device)
    else:
        slots = num_query_block_slots(q.shape[0], kv.batch)
        blocks_of = (cu_seqlens_q.diff() + BLOCK_SIZE - 1) // BLOCK_SIZE
        bounds = torch.nn.functional.pad(blocks_of.cumsum(0), (1, 0)).to(torch.int32)
    return BlockSelection(
        indices=q.new_full((slots, kv.num_kv_heads, config.budget), -1, dtype=torch.int32),
        counts=q.new_zeros((slots, kv.num_kv_heads), dtype=torch.int32),
        cu_q_blocks=bounds,
    )


def keep_best(scored: ScoredBlocks, own: Tensor, config: SelectionConfig) -> tuple[Tensor, Tensor]:
    """Lists of each query block: forced blocks, then by rank; equal ranks keep the selector's order.

    own: ``[m]`` block of each query block. Returns indices ``[m, heads, budget]`` int32 ascending then -1,
    and counts ``[m, heads]`` int32.
    """
    blocks = scored.blocks[:, None].expand_as(scored.scores)
    visible = (blocks >= 0) & (blocks <= own[None, :, None])
    forced = visible & ((blocks < config.sink_blocks) | (blocks > own[None, :, None] - config.local_blocks))
    mass = scored.scores.masked_fill(~visible, 0.0)
    ranks = scored.scores if scored.ranks is None else scored.ranks
    rank = ranks.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf)
    order = rank.argsort(dim=-1, descending=True, stable=True)[..., : config.budget]
    keep = visible.gather(-1, order)
    if config.top_p is not None:
        taken = (mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)).gather(-1, order)
        keep &= forced.gather(-1, order) | (taken.cumsum(-1) - taken < config.top_p)
    last = torch.iinfo(torch.int32).max
    listed = blocks.gather(-1, order).masked_fill(~keep, last).sort(-1).values
    listed = torch.nn.functional.pad(listed, (0, config.budget - listed.shape[-1]), value=last)
    indices = listed.masked_fill(listed == last, -1).transpose(0, 1)
    return indices.to(torch.int32), keep.sum(-1).T.to(torch.int32)


def listed_blocks(selection: BlockSelection, slot: int) -> Tensor:
    """Lists of one row as ``[num_kv_heads, budget]`` int64, -1 past each count."""
    listed = selection.indices[slot].long()
    past = torch.arange(listed.shape[1], device=listed.device) >= selection.counts[slot][:, None]
    return listed.masked_fill(past, -1)


def check_aligned(chunk: Chunk) -> None:
    """Raise InvalidArgument unless the chunk starts at a multiple of 64 tokens."""
    if chunk.offset % BLOCK_SIZE:
        raise InvalidArgument(
            "seq_lens",
            needed=f"chunk offset (seq_len - q_len) a multiple of {BLOCK_SIZE} in sparse prefill",
            got=f"{chunk.offset} for sequence {chunk.sequence}",
        )


def _load(name: str) -> Selector:
    module, function = selector_location(name)
    selector: Selector = getattr(import_module(f"kvrelay_kernels.reference.{module}"), function)
    return selector
