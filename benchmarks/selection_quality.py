"""How much of the attention that matters a selector keeps, on captured queries and keys.

Counts only query blocks with a choice: those that see more blocks than the budget.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from captured_attention import CapturedLayer
from kvrelay_kernels import (
    BLOCK_SIZE,
    SELECTORS,
    BlockSelection,
    SelectionConfig,
    kv_block_stats,
    select_blocks,
)
from kvrelay_kernels.reference.attention_rows import attend_rows
from kvrelay_kernels.reference.query_groups import ScoredBlocks
from kvrelay_kernels.reference.select_blocks import keep_best, listed_blocks
from kvrelay_kernels.reference.sequences import sequence_view

MIN_GAP = 0.05
"""Layers where oracle and forced-only differ by no more than this share of attention are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerQuality:
    """One selector on one layer. Shares of attention mass, mean over counted query blocks and KV heads.

    forced: sinks and locals only. kept: the selector's list. oracle: the best list of the same length.
    distant: all mass outside the forced blocks. output_error: see the function.
    """

    layer: int
    forced: float
    kept: float
    oracle: float
    distant: float
    output_error: float

    @property
    def gap(self) -> float:
        return self.oracle - self.forced

    @property
    def gap_closed(self) -> float:
        return (self.kept - self.forced) / self.gap

    @property
    def distant_recall(self) -> float:
        return (self.kept - self.forced) / self.distant


def layer_quality(captured: CapturedLayer, config: SelectionConfig) -> LayerQuality:
    """Run one selector's reference over one layer and weigh its lists by the exact masses."""
    chosen = _select(captured, config)
    oracle = oracle_selection(captured, config)
    blocks = captured.mass.shape[1]
    forced = _forced(blocks, config).expand_as(captured.mass)
    kept_share, oracle_share, forced_share = (
        _share(captured.mass, listed, config.budget)
        for listed in (_as_mask(chosen, blocks), _as_mask(oracle, blocks), forced)
    )
    return LayerQuality(
        layer=captured.layer,
        forced=forced_share,
        kept=kept_share,
        oracle=oracle_share,
        distant=1.0 - forced_share,
        output_error=output_error(captured, chosen, config.budget),
    )


def output_error(captured: CapturedLayer, chosen: BlockSelection, budget: int) -> float:
    """Frobenius distance to dense attention's output, relative, over every sixth counted query block."""
    view = sequence_view(captured.paged(), 0)
    wrong = dense = 0.0
    for block in range(budget, captured.mass.shape[1], 6):
        rows = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        listed = listed_blocks(chosen, block)
        out, _ = attend_rows(captured.q[rows], rows.start, view, listed, captured.q.shape[-1] ** -0.5)
        wrong += float((out - captured.out[rows]).square().sum())
        dense += float(captured.out[rows].square().sum())
    return (wrong / dense) ** 0.5


def oracle_selection(captured: CapturedLayer, config: SelectionConfig) -> BlockSelection:
    """What selector ``oracle`` returns, from the masses already at hand."""
    own = torch.arange(captured.mass.shape[1])
    scored = ScoredBlocks(blocks=own.expand(captured.mass.shape[0], -1), scores=captured.mass)
    indices, counts = keep_best(scored, own, config)
    return BlockSelection(
        indices=indices, counts=counts, cu_q_blocks=torch.tensor([0, len(own)], dtype=torch.int32)
    )


def summarise(measured: Iterable[tuple[str, int, LayerQuality]]) -> list[dict[str, Any]]:
    """One row per (selector, budget), averaged over the layers whose gap exceeds ``MIN_GAP``."""
    rows: dict[tuple[str, int], list[LayerQuality]] = defaultdict(list)
    for selector, budget, quality in measured:
        if quality.gap > MIN_GAP:
            rows[selector, budget].append(quality)
    return [
        {
            "selector": selector,
            "budget": budget,
            "layers": len(layers),
            "gap_closed": round(fmean(each.gap_closed for each in layers), 4),
            "gap_closed_worst_layer": round(min(each.gap_closed for each in layers), 4),
            "distant_recall": round(fmean(each.distant_recall for each in layers), 4),
            "output_error": round(fmean(each.output_error for each in layers), 4),
        }
        for (selector, budget), layers in sorted(rows.items(), key=_table_order)
    ]


def _table_order(row: tuple[tuple[str, int], Any]) -> tuple[int, int]:
    (selector, budget), _ = row
    return budget, list(SELECTORS).index(selector)


def _select(captured: CapturedLayer, config: SelectionConfig) -> BlockSelection:
    if config.selector == "oracle":
        return oracle_selection(captured, config)
    kv = captured.paged()
    cu_seqlens_q = torch.tensor([0, len(captured.q)], dtype=torch.int32)
    stats = kv_block_stats(kv, impl="reference")
    return select_blocks(captured.q, kv, config, cu_seqlens_q=cu_seqlens_q, stats=stats, impl="reference")


def _as_mask(selection: BlockSelection, blocks: int) -> Tensor:
    """Lists as ``[num_kv_heads, blocks, blocks]`` bool."""
    listed = selection.indices[:blocks].transpose(0, 1).long()
    mask = torch.zeros(*listed.shape[:2], blocks + 1, dtype=torch.bool)
    return mask.scatter_(-1, listed.masked_fill(listed < 0, blocks), True)[..., :blocks]


def _forced(blocks: int, config: SelectionConfig) -> Tensor:
    own, key = torch.arange(blocks)[:, None], torch.arange(blocks)
    return (key <= own) & ((key < config.sink_blocks) | (key > own - config.local_blocks))


def _share(mass: Tensor, listed: Tensor, budget: int) -> float:
    return (mass * listed).sum(-1)[:, budget:].mean().item()
