"""One call per kind of rows in a batch: dense or sparse, a prompt's chunk or single rows.

Knows tables and kernels. Knows nothing of where a batch was cut into kinds.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kvrelay.attention.gathered import GatheredDecode, GatheredPrefill
from kvrelay.attention.spans import Run, Span
from kvrelay.sparse import AttentionUse, SparseAttention
from kvrelay.types import BLOCK_SIZE, num_blocks
from kvrelay_kernels import (
    BlockSelection,
    KVBlockStats,
    PagedKV,
    SelectionConfig,
    block_sparse_decode,
    chosen_implementation,
    paged_decode,
    paged_prefill,
    select_blocks,
    sparse_prefill,
)

Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dense_backend(like: torch.Tensor) -> str:
    """What computes dense attention on tensors like `like [..., head_dim]`.

    `cpu-native`, the library's C++ kernels, wherever they run: 1.1 to 14 times as fast as `sdpa`, torch over
    gathered pages, which is faster than the library's own batched torch.
    """
    return "cpu-native" if chosen_implementation("paged_prefill", like) == "cpu-native" else "sdpa"


def selection_config(sparse: SparseAttention, num_pages: int, *, one_by_one: bool) -> SelectionConfig:
    """The kernel library's settings: counts in blocks, for a pool of `num_pages`.

    Lists take memory for the whole budget, and for all candidates: what is beyond the pool is cut, which
    changes no list.
    """
    sinks, recent = min(sparse.sink_blocks, num_pages), min(sparse.local_blocks, num_pages)
    budget = sparse.budget(is_generated=one_by_one) // BLOCK_SIZE
    candidates = min(sparse.candidate_tokens // BLOCK_SIZE, num_pages)
    config = SelectionConfig(
        budget=min(budget, max(num_pages, sinks + recent)),
        selector=sparse.selector,
        sink_blocks=sinks,
        local_blocks=recent,
        top_p=sparse.top_p,
    )
    factor = max(config.candidate_factor, (candidates + 0.5) / config.budget)
    every_row_ranks = sparse.exact and not one_by_one  # a single row ranks by itself anyway
    rows = BLOCK_SIZE if every_row_ranks else config.sampled_queries
    return replace(config, candidate_factor=factor, sampled_queries=rows, by_peak=every_row_ranks)


def lists_per_group(sparse: SparseAttention, num_q_heads: int, num_kv_heads: int) -> int:
    """Lists of the query heads of a KV group: one each with `exact`, else one for all."""
    return num_q_heads // num_kv_heads if sparse.exact else 1


def pairs_read(count: int, num_lists: int, num_rows: int, own: int) -> int:
    """(query, key) pairs of rows whose lists hold `count` blocks together, the rows' own among each list's.

    In that block the rows read `own` pairs, being causal.
    """
    return (count - num_lists) * BLOCK_SIZE * num_rows + num_lists * own


def heads_apart(q: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """The query heads of a group as rows of their own: a list is for the heads of a group in one row.

    `q [rows, num_q_heads, head_dim]` becomes `[group * rows, num_kv_heads, head_dim]`: every group's first
    head in all rows, then every group's second, and so on.
    """
    rows, _, head_dim = q.shape
    return q.view(rows, num_kv_heads, -1, head_dim).permute(2, 0, 1, 3).reshape(-1, num_kv_heads, head_dim)


def repeated(kv: PagedKV, times: int) -> PagedKV:
    """The batch `times` over: its sequences in order, then again."""
    return replace(kv, block_table=kv.block_table.repeat(times, 1), seq_lens=kv.seq_lens.repeat(times))


class Call:
    """Rows of a batch that attend alike, as the kernels take them; counts what was attended."""

    def __init__(self, runs: Sequence[Run], spans: Sequence[Span], like: torch.Tensor) -> None:
        self.runs, self._device = runs, like.device
        self._sparse, self._one_by_one = runs[0].sparse, runs[0].one_by_one
        sequences = [(spans[run.span].block_ids, end) for run in runs for end in _ends(run)]
        ends = [end for _, end in sequences]
        tables = [block_ids[: num_blocks(end)] for block_ids, end in sequences]
        width = max(map(len, tables))
        padded = [[*table, *[0] * (width - len(table))] for table in tables]
        self._table = torch.tensor(padded, dtype=torch.int32, device=like.device)
        self._lengths = torch.tensor(ends, dtype=torch.int32, device=like.device)
        rows = torch.tensor([0, *(run.end - run.start for run in runs)]).cumsum(0)
        self._bounds = rows.to(torch.int32).to(like.device)
        self._gathered = self._gather(tables, ends) if dense_backend(like) == "sdpa" else None
        self._counts: torch.Tensor | None = None
        self._num_sparse_layers = 0
        self._lists_per_head = 1

    def __call__(
        self,
        layer: int,
        q: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        stats: KVBlockStats | None,
    ) -> torch.Tensor:
        """q and out `[rows, num_q_heads, head_dim]`."""
        is_dense = self._sparse is None or layer in self._sparse.dense_layers
        if is_dense and self._gathered is not None:
            return self._gathered(q, *pages)
        kv = PagedKV(k_pages=pages[0], v_pages=pages[1], block_table=self._table, seq_lens=self._lengths)
        if not is_dense:
            return self._attend_selected(q, kv, stats)
        return paged_decode(q, kv)[0] if self._one_by_one else paged_prefill(q, kv, self._bounds)[0]

    def uses(self, num_layers: int, num_kv_heads: int) -> list[AttentionUse]:
        """What each run attended in a forward pass of so many layers, all KV heads together."""
        found, slot = [], 0
        counts = self._blocks_read()
        for run in self.runs:
            blocks = _query_blocks(run)
            rows = (run.end - run.start) * num_kv_heads
            causal = sum(seen for _, seen, _ in blocks) * num_kv_heads
            attended = causal * num_layers
            if counts is not None:
                own_lists = self._num_sparse_layers * num_kv_heads
                attended = causal * (num_layers - self._num_sparse_layers)
                for count, (num_rows, _, own) in zip(counts[slot : slot + len(blocks)], blocks, strict=True):
                    attended += pairs_read(count // self._lists_per_head, own_lists, num_rows, own)
            slot += len(blocks)
            found.append(AttentionUse(rows * num_layers, attended, causal * num_layers))
        return found

    def _blocks_read(self) -> list[int] | None:
        """Blocks in the lists of each query block, all layers and KV heads, query heads' lists together."""
        if self._counts is None:
            return None
        in_use = sum(len(_query_blocks(run)) for run in self.runs)
        own = self._counts.sum(1)[: self._lists_per_head * in_use]
        return own.view(self._lists_per_head, in_use).sum(0).tolist()

    def _gather(self, tables: Sequence[Sequence[int]], ends: Sequence[int]) -> Dense:
        if self._one_by_one:
            return GatheredDecode(tables, ends, self._device)
        starts = [run.start for run in self.runs]
        return GatheredPrefill(list(zip(starts, ends, tables, strict=True)))

    def _attend_selected(self, q: torch.Tensor, kv: PagedKV, stats: KVBlockStats | None) -> torch.Tensor:
        """One list per KV head; with `exact` one per query head, as if each were a sequence of its own."""
        assert self._sparse is not None
        self._num_sparse_layers += 1
        self._lists_per_head = group = lists_per_group(self._sparse, q.shape[1], kv.num_kv_heads)
        if group == 1:
            return self._attend_lists(q, kv, self._bounds, stats)
        firsts = torch.arange(group, device=q.device, dtype=torch.int32)[:, None] * len(q)
        bounds = torch.cat([self._bounds[:1], (firsts + self._bounds[1:]).flatten()])
        out = self._attend_lists(heads_apart(q, kv.num_kv_heads), repeated(kv, group), bounds, stats)
        return out.view(group, len(q), kv.num_kv_heads, -1).permute(1, 2, 0, 3).reshape(q.shape)

    def _attend_lists(
        self, q: torch.Tensor, kv: PagedKV, bounds: torch.Tensor, stats: KVBlockStats | None
    ) -> torch.Tensor:
        assert self._sparse is not None
        config = selection_config(self._sparse, len(kv.k_pages), one_by_one=self._one_by_one)
        if self._one_by_one:
            chosen = select_blocks(q, kv, config, stats=stats)
            out = block_sparse_decode(q, kv, chosen)[0]
        else:
            out, _, chosen = sparse_prefill(q, kv, bounds, config, stats=stats)
        self._count(chosen)
        return out

    def _count(self, chosen: BlockSelection) -> None:
        if self._counts is None:
            self._counts = torch.zeros_like(chosen.counts)
        self._counts += chosen.counts


def _ends(run: Run) -> range:
    """KV length of each sequence that the run is, for the kernels."""
    return range(run.start + 1, run.end + 1) if run.one_by_one else range(run.end, run.end + 1)


def _query_blocks(run: Run) -> list[tuple[int, int, int]]:
    """Per list of blocks: its rows, the pairs that dense attention has, and those in the rows' own block."""
    if run.one_by_one:
        return [(1, end, (end - 1) % BLOCK_SIZE + 1) for end in range(run.start + 1, run.end + 1)]
    found = []
    for first in range(run.start, run.end, BLOCK_SIZE):
        rows = min(BLOCK_SIZE, run.end - first)
        own = rows * (rows + 1) // 2
        found.append((rows, rows * first + own, own))
    return found
