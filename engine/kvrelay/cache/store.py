"""The tensors behind the block ids: K and V pages of every layer, and their digests.

Knows shapes, dtypes and bytes. Knows nothing about who owns which block.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from kvrelay.cache.memory import KVMemory
from kvrelay.errors import TransportError
from kvrelay.types import KVLayout
from kvrelay_kernels import KVBlockStats, PagedKV, update_kv_block_stats


class KVStore:
    """Pages `[num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim]`; index 0 of axis 1 is K.

    `landed` is the host memory that peers write into, of `memory_bytes` bytes, and `landing` its pages. On a
    CPU worker it is `memory` itself, so a transfer ends where attention reads. On a device it is a staging
    copy, and `land` moves a request's blocks over once they are complete, `land_tiles` parts of them.

    With `keeps_stats`, statistics of every block's keys lie beside the pages, under the same ids: written
    when a block is full, they move, are shared and are freed with it. They add 4 % to a block's bytes.

    With `has_spare_page`, `pages` are never the landing and end with a page that is no block: for rows of a
    batch that are no sequence's.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        buffer: memoryview,
        device: torch.device,
        *,
        keeps_stats: bool = False,
        has_spare_page: bool = False,
    ) -> None:
        self.layout, self.num_blocks, self.device = layout, num_blocks, device
        self.landed = KVMemory.view(layout, num_blocks, buffer, keeps_stats=keeps_stats)
        for unwritten in self.landed.tensors[1:]:
            unwritten.fill_(torch.nan)
        self.landing = self.landed.pages
        if device.type == "cuda":
            pin(self.landing)
        num_pages = num_blocks + has_spare_page
        is_staged = device.type != "cpu" or has_spare_page
        self.memory = KVMemory.empty(layout, num_pages, device, keeps_stats) if is_staged else self.landed
        self.pages = self.memory.pages
        self._stats = [_stats_of(self.memory, layer) for layer in range(len(self.memory.vectors))]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pages of one layer, `[num_blocks, num_kv_heads, block_size, head_dim]` each."""
        return self.pages[index, 0], self.pages[index, 1]

    @property
    def keeps_stats(self) -> bool:
        """Whether block statistics are kept, without which nothing can be selected."""
        return bool(self._stats)

    def stats(self, layer: int) -> KVBlockStats | None:
        """Statistics of one layer's keys, block by block; None where none are kept."""
        return self._stats[layer] if self._stats else None

    def update_stats(self, layer: int, appended: Sequence[tuple[Sequence[int], int, int]]) -> None:
        """Write the statistics of the blocks that were just filled.

        appended: of each sequence its block ids, its tokens now, and how many of them are new.
        """
        width = max(len(block_ids) for block_ids, _, _ in appended)
        table = [[*block_ids, *[0] * (width - len(block_ids))] for block_ids, _, _ in appended]
        lengths, new = ([row[index] for row in appended] for index in (1, 2))
        table_, lengths_, new_ = (
            torch.tensor(numbers, dtype=torch.int32, device=self.device) for numbers in (table, lengths, new)
        )
        k_pages, v_pages = self.layer(layer)
        kv = PagedKV(k_pages=k_pages, v_pages=v_pages, block_table=table_, seq_lens=lengths_)
        update_kv_block_stats(self._stats[layer], kv, new_)

    def refresh_stats(self, block_ids: Sequence[int], num_tokens: int, num_new: int | None = None) -> None:
        """Statistics from the keys themselves, for blocks whose bytes came from elsewhere.

        `block_ids` hold a sequence's first `num_tokens` tokens in order, of which the last `num_new` (None:
        all) came. Reads each key of these once.
        """
        for layer in range(len(self._stats)):
            self.update_stats(layer, [(block_ids, num_tokens, num_tokens if num_new is None else num_new)])

    def land(self, block_ids: Sequence[int]) -> None:
        """Make the landed bytes of these blocks visible in `pages`."""
        if self.pages is self.landing or not block_ids:
            return
        index = torch.tensor(block_ids, dtype=torch.int64)
        self.pages[:, :, index.to(self.device)] = self.landing[:, :, index].to(self.device)

    def tile_digests(
        self, tiles: Mapping[int, Collection[int]], block_ids: Sequence[int], *, landed: bool = False
    ) -> dict[int, str]:
        """By layer, the digest of the numbered tiles (see `Arrivals`) of a sequence on these blocks.

        K and V before statistics; of `memory`, or of what peers wrote.
        """
        memory = self.landed if landed else self.memory
        return {
            layer: "/".join(
                memory.digest(layer, parts, [block_ids[page] for page in pages])
                for parts, pages in self._pieces(numbers)
            )
            for layer, numbers in tiles.items()
        }

    def land_tiles(self, tiles: Mapping[int, Collection[int]], block_ids: Sequence[int]) -> None:
        """Make the landed bytes of the numbered tiles visible."""
        if self.memory is self.landed:
            return
        for layer, numbers in tiles.items():
            for parts, pages in self._pieces(numbers):
                self.memory.copy(self.landed, layer, parts, [(block_ids[page],) * 2 for page in pages])

    def _pieces(self, numbers: Collection[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Part and page of each numbered tile: of those of K and V, then of statistics, which never mix."""
        num_parts = self.layout.num_parts
        for is_stats in (False, True):
            chosen = [n for n in sorted(numbers) if (n % num_parts == num_parts - 1) is is_stats]
            if chosen:
                yield [n % num_parts for n in chosen], [n // num_parts for n in chosen]

    def read_block(self, block: int) -> memoryview:
        """A copy of the block's bytes, K and V of every layer."""
        copied = self.pages[:, :, block].clone(memory_format=torch.contiguous_format)
        return copied.cpu().view(torch.uint8).flatten().numpy().data

    def write_block(self, block: int, content: bytearray | memoryview | bytes) -> None:
        """Put back what `read_block` gave."""
        pages = self.pages[:, :, block]
        pages.copy_(torch.frombuffer(content, dtype=pages.dtype).view(pages.shape))

    def digests(self, block_ids: Sequence[int], *, landed: bool = False) -> tuple[str, ...]:
        """BLAKE2b of each block's bytes, K and V of every layer, 16 hex digits each.

        Of the pages attention reads, or (`landed`) of what peers wrote, before `land`.
        """
        return tuple(_digest((self.landing if landed else self.pages)[:, :, block]) for block in block_ids)


def pin(pages: torch.Tensor) -> None:
    """Page-lock host memory that a CUDA device copies to or from, in this process.

    Raises `TransportError` when the driver refuses (the limit of locked memory, say).
    """
    code = int(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.nbytes, 0))  # type: ignore[no-untyped-call]
    if code != 0:
        raise TransportError(f"cudaHostRegister of {pages.nbytes} bytes failed with CUDA error {code}")


def _digest(block: torch.Tensor) -> str:
    data = block.contiguous().cpu().view(torch.uint8)
    return hashlib.blake2b(data.numpy().data, digest_size=8).hexdigest()


def _stats_of(memory: KVMemory, layer: int) -> KVBlockStats:
    mean, minimum, maximum, coarse_minimum, coarse_maximum = memory.vectors[layer]
    return KVBlockStats(
        mean=mean,
        minimum=minimum,
        maximum=maximum,
        spread=memory.spreads[layer],
        coarse_minimum=coarse_minimum,
        coarse_maximum=coarse_maximum,
    )
