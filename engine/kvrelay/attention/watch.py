"""Which tiles of the cache a generated token reads, and which of them are not there yet.

Knows selections and numbers of tiles. Knows nothing of how they travel.
"""

import torch

from kvrelay.attention.call import heads_apart, repeated, selection_config
from kvrelay.attention.spans import Span
from kvrelay.cache.arrivals import Arrivals, Tiles
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
        """Note what `q [1, num_q_heads, head_dim]` reads; whether some of it has not come yet.

        A dense layer reads all: nothing to note, unless it has not come.
        """
        is_dense, arrivals = layer in self._sparse.dense_layers, self._span.arrivals
        if arrivals is None:
            tiles = set() if is_dense else self._read(layer, q)
        else:
            tiles = arrivals.rest_of(layer) if is_dense else self._lacking(layer, q, arrivals)
        if tiles:
            self.tiles[layer] = tiles
        return bool(tiles) and arrivals is not None

    def _lacking(self, layer: int, q: torch.Tensor, arrivals: Arrivals) -> set[int]:
        heads, num_parts = self._store.layout.num_kv_heads, self._store.layout.num_parts
        tiles = arrivals.missing(layer, self._read(layer, q))
        values = {tile + heads for tile in tiles if tile % num_parts < heads}  # likely to be wanted next
        return tiles | arrivals.missing(layer, values)

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
