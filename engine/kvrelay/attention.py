"""The one seam between the model and attention: stores new K and V in pages, attends over them.

Dense attention is `scaled_dot_product_attention` over gathered pages, until the kernel library takes over
here. Knows pages and lengths; knows nothing of requests, workers or text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from kvrelay.cache.store import KVStore
from kvrelay.types import num_blocks


@dataclass(frozen=True, slots=True)
class Span:
    """`length` new tokens of one sequence from position `start`, and the pages that hold the sequence."""

    start: int
    length: int
    block_ids: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens in the cache after this span: the sequence's KV length."""
        return self.start + self.length


class PagedAttention:
    """`attend` for one batch of spans, laid out one after the other in the flat token axis.

    After a layer has been attended, `after_layer(layer)` is called: its K and V of this batch are in the
    pages and may be sent away.
    """

    def __init__(
        self, store: KVStore, spans: Sequence[Span], after_layer: Callable[[int], None] | None = None
    ) -> None:
        self._store, self._spans, self._after_layer = store, spans, after_layer
        self._slots = _slot_mapping(spans, store.layout.block_size).to(store.device)
        self._is_decode = all(span.length == 1 for span in spans)
        if self._is_decode:
            self._block_table, self._mask = _decode_tables(spans, store)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q `[T, num_q_heads, head_dim]`, k and v `[T, num_kv_heads, head_dim]`; out is shaped as q."""
        k_pages, v_pages = self._store.layer(layer)
        block_size = self._store.layout.block_size
        blocks, offsets = self._slots // block_size, self._slots % block_size
        k_pages[blocks, :, offsets] = k
        v_pages[blocks, :, offsets] = v
        out = self._decode(q, k_pages, v_pages) if self._is_decode else self._prefill(q, k_pages, v_pages)
        if self._after_layer is not None:
            self._after_layer(layer)
        return out

    def _decode(self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> torch.Tensor:
        """One query per sequence; the heads of a KV group are the rows of one small attention."""
        num_sequences, num_q_heads, head_dim = q.shape
        num_kv_heads = k_pages.shape[1]
        rows = q.reshape(num_sequences, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
        k, v = (_gather(pages, self._block_table) for pages in (k_pages, v_pages))
        out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=self._mask)
        return out.reshape(num_sequences, num_q_heads, head_dim)

    def _prefill(self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        first = 0
        for span in self._spans:
            last = first + span.length
            out[first:last] = _attend_span(q[first:last], k_pages, v_pages, span)
            first = last
        return out


def _attend_span(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, span: Span) -> torch.Tensor:
    """One sequence's chunk, causal, aligned to the end of its cache."""
    length, num_q_heads, head_dim = q.shape
    num_kv_heads, block_size = k_pages.shape[1], k_pages.shape[2]
    table = torch.tensor([span.block_ids[: num_blocks(span.end, block_size)]], device=q.device)
    shape = (num_kv_heads, num_q_heads // num_kv_heads, -1, head_dim)
    k, v = (_gather(p, table)[0, :, None, : span.end].expand(shape) for p in (k_pages, v_pages))
    rows = q.transpose(0, 1).reshape(shape)
    if span.start == 0:
        out = functional.scaled_dot_product_attention(rows, k, v, is_causal=True)
    else:
        positions = torch.arange(span.start, span.end, device=q.device)
        mask = torch.arange(span.end, device=q.device)[None] <= positions[:, None]
        out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    return out.reshape(num_q_heads, length, head_dim).transpose(0, 1)


def _gather(pages: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """Pages of each row of the table, `[B, num_kv_heads, max_blocks * block_size, head_dim]`."""
    num_sequences, max_blocks = block_table.shape
    _, num_kv_heads, block_size, head_dim = pages.shape
    gathered = pages[block_table].transpose(1, 2)
    return gathered.reshape(num_sequences, num_kv_heads, max_blocks * block_size, head_dim)


def _slot_mapping(spans: Sequence[Span], block_size: int) -> torch.Tensor:
    """Flat slot (block * block_size + offset) of every new token, `[T]`."""
    slots = []
    for span in spans:
        positions = torch.arange(span.start, span.end)
        slots.append(torch.tensor(span.block_ids)[positions // block_size] * block_size + positions % block_size)
    return torch.cat(slots)


def _decode_tables(spans: Sequence[Span], store: KVStore) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded block table `[B, max_blocks]` and the mask of valid slots `[B, 1, 1, max_blocks * block_size]`.

    Rows are padded with their own first block, so that no foreign page is ever read.
    """
    block_size = store.layout.block_size
    width = max(num_blocks(span.end, block_size) for span in spans)
    rows = []
    for span in spans:
        used = list(span.block_ids[: num_blocks(span.end, block_size)])
        rows.append(used + [used[0]] * (width - len(used)))
    lengths = torch.tensor([span.end for span in spans])
    mask = torch.arange(width * block_size)[None] < lengths[:, None]
    return torch.tensor(rows, device=store.device), mask[:, None, None].to(store.device)
