"""The memory that peers write into: K and V pages of every layer and the statistics beside them, one buffer.

Knows shapes and addresses. Knows nothing about who owns which block.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from kvrelay.types import KVLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NUM_VECTORS = 5  # per block and KV head: mean, minimum, maximum, minimum and maximum of a tree node


@dataclass(frozen=True, slots=True, kw_only=True)
class KVMemory:
    """One worker's pages and statistics.

    pages: `[num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim]`; index 0 of axis 1 is K.
    vectors: `[num_layers, 5, num_blocks, num_kv_heads, head_dim]`, spreads: `[num_layers, num_blocks,
        num_kv_heads]`: what `KVBlockStats` holds; no layers where no statistics are kept.

    A block's part `p` of one layer is K of head p, for p below `num_kv_heads`; V of head p - `num_kv_heads`
    below twice that; and the block's statistics at `KVLayout.statistics`.
    """

    pages: torch.Tensor
    vectors: torch.Tensor
    spreads: torch.Tensor

    @classmethod
    def view(cls, layout: KVLayout, num_blocks: int, buffer: memoryview, *, keeps_stats: bool) -> Self:
        """A buffer of `memory_bytes` bytes seen as such; no copy."""
        shapes = _shapes(layout, num_blocks, keeps_stats)
        counts = [shape.numel() for shape in shapes]
        flat = torch.frombuffer(buffer, dtype=DTYPES[layout.dtype], count=sum(counts))
        parts = torch.split(flat, counts)
        pages, vectors, spreads = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return cls(pages=pages, vectors=vectors, spreads=spreads)

    @classmethod
    def empty(cls, layout: KVLayout, num_blocks: int, device: torch.device, keeps_stats: bool) -> Self:
        """Memory of a device: zeroed pages, statistics that are not numbers yet."""
        pages, vectors, spreads = _shapes(layout, num_blocks, keeps_stats)
        dtype = DTYPES[layout.dtype]
        return cls(
            pages=torch.zeros(pages, dtype=dtype, device=device),
            vectors=torch.full(vectors, torch.nan, dtype=dtype, device=device),
            spreads=torch.full(spreads, torch.nan, dtype=dtype, device=device),
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages, vectors and spreads."""
        return self.pages, self.vectors, self.spreads

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where those lie."""
        pages, vectors, spreads = (tensor.data_ptr() for tensor in self.tensors)
        return pages, vectors, spreads

    def read(self, layer: int, parts: Sequence[int], blocks: Sequence[int]) -> torch.Tensor:
        """Part `parts[i]` of block `blocks[i]`, one after the other: a copy, as bytes."""
        found = [self.pages[self._places(layer, parts, blocks)].flatten(1)] if self._are_tiles(parts) else []
        if not found:
            index = torch.tensor(blocks, device=self.pages.device)
            found = [self.vectors[layer][:, index].flatten(1), self.spreads[layer, index].flatten(0)[None]]
        return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in found])

    def copy(
        self, source: "KVMemory", layer: int, parts: Sequence[int], blocks: Sequence[tuple[int, int]]
    ) -> int:
        """Copy part `parts[i]` of `source`'s block `blocks[i][0]` to block `blocks[i][1]` here; the bytes."""
        theirs, mine = [first for first, _ in blocks], [second for _, second in blocks]
        if self._are_tiles(parts):
            tiles = source.pages[source._places(layer, parts, theirs)]
            self.pages[self._places(layer, parts, mine)] = tiles.to(self.pages.device)
            return tiles.nbytes
        taken = torch.tensor(theirs, device=source.pages.device)
        index = torch.tensor(mine, device=self.pages.device)
        vectors, spreads = source.vectors[layer][:, taken], source.spreads[layer, taken]
        self.vectors[layer][:, index] = vectors.to(self.pages.device)
        self.spreads[layer, index] = spreads.to(self.pages.device)
        return vectors.nbytes + spreads.nbytes

    def digest(self, layer: int, parts: Sequence[int], blocks: Sequence[int]) -> str:
        """BLAKE2b of those parts' bytes, 16 hex digits."""
        data = self.read(layer, parts, blocks).cpu()
        return hashlib.blake2b(data.numpy().data, digest_size=8).hexdigest()

    def _are_tiles(self, parts: Sequence[int]) -> bool:
        """Whether these are tiles of K and V; statistics are never mixed with them."""
        return parts[0] < 2 * self.pages.shape[3]

    def _places(self, layer: int, parts: Sequence[int], blocks: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Index of tiles into `pages`: layer, K or V, block, head."""
        device, heads = self.pages.device, self.pages.shape[3]
        halves = torch.tensor([part // heads for part in parts], device=device)
        index = torch.tensor(blocks, device=device)
        chosen = torch.tensor([part % heads for part in parts], device=device)
        return torch.full_like(halves, layer), halves, index, chosen


def _shapes(layout: KVLayout, num_blocks: int, keeps_stats: bool) -> tuple[torch.Size, ...]:
    heads, head_dim = layout.num_kv_heads, layout.head_dim
    layers = layout.num_layers if keeps_stats else 0
    return (
        torch.Size((layout.num_layers, 2, num_blocks, heads, layout.block_size, head_dim)),
        torch.Size((layers, NUM_VECTORS, num_blocks, heads, head_dim)),
        torch.Size((layers, num_blocks, heads)),
    )


def stats_bytes(layout: KVLayout) -> int:
    """Bytes of one block's statistics over all layers: five vectors and a number per KV head."""
    size = DTYPES[layout.dtype].itemsize
    return layout.num_layers * layout.num_kv_heads * (NUM_VECTORS * layout.head_dim + 1) * size


def memory_bytes(layout: KVLayout, num_blocks: int, *, keeps_stats: bool) -> int:
    """Bytes that `num_blocks` blocks take, their statistics included where they are kept."""
    return num_blocks * (layout.block_bytes + (stats_bytes(layout) if keeps_stats else 0))
