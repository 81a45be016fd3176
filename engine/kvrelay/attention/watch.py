"""Which tiles of the cache a generated token reads, and which of them are not there yet.

Knows selections and numbers of tiles. Knows nothing of how they travel.
"""

import torch

from kvrelay.attention.call import heads_apart, repeated, selection_config
from kvrelay.attention.spans import Span
from kvrelay.cache.arrivals import Tiles
from kvrelay.cache.store import KVStore
from kvrelay.types import num_blocks
from kvrelay_kernels import BlockSelection, PagedKV, select_blocks

RERANKING = ("tree", "two_stage")  # read the keys of candidates that they may then leave out


class Watch:
    """Follows the last row of one span, whose first is row `first`, through a forward pass."""

    def __init__(self, store: KVStore, span: Span, first: int) -> None:
        assert span.sparse is not None
        self._store, self._span, self._sparse = store, span, span.sparse
        self.row = slice(first + span.length - 1, first + span.length)
        table = [span.block_ids[: num_blocks(span.end)]]
        self._table = torch.tensor(table, dtype=torch.int32, device=store.device)
        self._lengths = torch.tensor([span.end], dtype=torch.int32, device=store.device)
        self.tiles: Tiles = {}

    def __call__(self, layer: int, q: torch.Tensor) -> bool:
        """Note what `q [1, num_q_heads, head_dim]` reads; whether some of it has not come yet."""
        if layer in self._sparse.dense_layers:
            return False
        tiles = self._read(layer, q)
        if self._span.arrivals is not None:
            tiles = self._span.arrivals.missing(layer, tiles)
            keys = {tile for tile in tiles if self._part(tile) < self._store.layout.num_kv_heads}
            values = {tile + self._store.layout.num_kv_heads for tile in keys}  # likely to be wanted next
            tiles |= self._span.arrivals.missing(layer, values)
        if tiles:
            self.tiles[layer] = tiles
        return bool(tiles) and self._span.arrivals is not None

    def _part(self, tile: int) -> int:
        return tile % self._store.layout.num_parts

    def _read(self, layer: int, q: torch.Tensor) -> set[int]:
        """Keys of all blocks that are ranked by them, values of those that are selected."""
        pages, stats = self._store.layer(layer), self._store.stats(layer)
        kv = PagedKV(k_pages=pages[0], v_pages=pages[1], block_table=self._table, seq_lens=self._lengths)
        config = selection_config(self._sparse, len(pages[0]), one_by_one=True)
        heads = self._store.layout.num_kv_heads
        if self._sparse.exact:
            kv, q = repeated(kv, q.shape[1] // heads), heads_apart(q, heads)
        chosen = ranked = select_blocks(q, kv, config, stats=stats)
        if config.selector in RERANKING:
            ranked = select_blocks(q, kv, config.unranked(), stats=stats)
        return self._numbers(ranked, 0) | self._numbers(chosen, heads)

    def _numbers(self, lists: BlockSelection, first_part: int) -> set[int]:
        """Tile numbers of the listed blocks, head h's being part `first_part + h`."""
        num_parts = self._store.layout.num_parts
        parts = first_part + torch.arange(lists.indices.shape[1], device=lists.indices.device)
        numbers = lists.indices.long() * num_parts + parts[None, :, None]
        in_use = torch.arange(lists.indices.shape[2], device=numbers.device) < lists.counts[..., None]
        return set(numbers[in_use].tolist())
