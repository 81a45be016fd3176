"""`attend` for one batch: stores K and V, keeps block statistics, and hands each kind of rows to its call."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from kvrelay.attention.call import Call
from kvrelay.attention.spans import Run, Span, runs_of
from kvrelay.attention.watch import Watch
from kvrelay.cache.arrivals import Tiles
from kvrelay.cache.store import KVStore
from kvrelay.sparse import AttentionUse, SparseAttention


class PagedAttention:
    """`attend` for one batch of spans, laid out one after the other in the flat token axis.

    After a layer has been attended, `after_layer(layer)` is called: its K and V of this batch are in the
    pages and may be sent away. Spans with `sparse` settings need a store that keeps statistics.
    """

    def __init__(
        self, store: KVStore, spans: Sequence[Span], after_layer: Callable[[int], None] | None = None
    ) -> None:
        self._store, self._spans, self._after_layer = store, spans, after_layer
        slots = _slot_mapping(spans, store.layout.block_size).to(store.device)
        self._blocks, self._offsets = slots // store.layout.block_size, slots % store.layout.block_size
        self._calls = [(_rows(runs), Call(runs, spans, store.pages)) for runs in _alike(spans)]
        self._watches = _watches(store, spans)
        self._completed = [(s.block_ids, s.end, s.length) for s in spans if _completes_a_page(s, store)]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q `[T, num_q_heads, head_dim]`, k and v `[T, num_kv_heads, head_dim]`; out is shaped as q."""
        k_pages, v_pages = self._store.layer(layer)
        k_pages[self._blocks, :, self._offsets] = k
        v_pages[self._blocks, :, self._offsets] = v
        if self._completed:
            self._store.update_stats(layer, self._completed)
        stats = self._store.stats(layer)
        parts = [(rows, call(layer, q[rows], (k_pages, v_pages), stats)) for rows, call in self._calls]
        if len(parts) == 1:
            out = parts[0][1]
        else:
            out = torch.empty_like(q)
            for rows, part in parts:
                out[rows] = part
        for watch in self._watches:
            if watch is not None and watch(layer, q[watch.row]):
                out[watch.row] = out[watch.row].nan_to_num()  # of no use, but later layers compute with it
        if self._after_layer is not None:
            self._after_layer(layer)
        return out

    def watched(self) -> list[Tiles]:
        """Of each span, by layer, what its watched row reads, or lacks; call it after the last layer."""
        return [{} if watch is None else watch.tiles for watch in self._watches]

    def uses(self) -> list[AttentionUse]:
        """What each span attended in the forward pass that used this; call it after the last layer."""
        layout = self._store.layout
        found = [AttentionUse()] * len(self._spans)
        for _, call in self._calls:
            uses = call.uses(layout.num_layers, layout.num_kv_heads)
            for run, use in zip(call.runs, uses, strict=True):
                found[run.span] += use
        return found


def _watches(store: KVStore, spans: Sequence[Span]) -> list[Watch | None]:
    starts = accumulate((span.length for span in spans), initial=0)
    return [
        Watch(store, span, row) if span.sparse is not None and span.is_watched else None
        for span, row in zip(spans, starts, strict=False)
    ]


def _alike(spans: Sequence[Span]) -> list[list[Run]]:
    """The runs of a batch, those that attend alike together."""
    found: dict[tuple[bool, SparseAttention | None], list[Run]] = {}
    for run in runs_of(spans):
        found.setdefault((run.one_by_one, run.sparse), []).append(run)
    return list(found.values())


def _rows(runs: Sequence[Run]) -> slice | torch.Tensor:
    """Rows of the flat token axis, as a slice where they lie together."""
    first, last = runs[0].row, runs[-1].row + runs[-1].end - runs[-1].start
    if last - first == sum(run.end - run.start for run in runs):
        return slice(first, last)
    picked = [torch.arange(run.row, run.row + run.end - run.start) for run in runs]
    return torch.cat(picked)


def _completes_a_page(span: Span, store: KVStore) -> bool:
    size = store.layout.block_size
    return store.keeps_stats and span.end // size > span.start // size


def _slot_mapping(spans: Sequence[Span], block_size: int) -> torch.Tensor:
    """Flat slot (block * block_size + offset) of every new token, `[T]`."""
    slots = []
    for span in spans:
        positions = torch.arange(span.start, span.end)
        slots.append(
            torch.tensor(span.block_ids)[positions // block_size] * block_size + positions % block_size
        )
    return torch.cat(slots)
