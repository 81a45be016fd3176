"""The tensors behind the block ids: K and V pages of every layer, and their digests.

Knows shapes, dtypes and bytes. Knows nothing about who owns which block.
"""

import hashlib
from collections.abc import Sequence

import torch

from kvrelay.types import KVLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVStore:
    """Pages `[num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim]`; index 0 of axis 1 is K.

    `landing` is the host memory that peers write into, of the same shape. On a CPU worker it is the pages
    themselves, so a transfer ends where attention reads. On a device it is a staging copy, and `land` moves
    a request's blocks over once they are complete.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, buffer: memoryview, device: torch.device) -> None:
        self.layout, self.num_blocks, self.device = layout, num_blocks, device
        self.landing = view_pages(layout, num_blocks, buffer)
        self.pages = self.landing if device.type == "cpu" else torch.zeros_like(self.landing, device=device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pages of one layer, `[num_blocks, num_kv_heads, block_size, head_dim]` each."""
        return self.pages[index, 0], self.pages[index, 1]

    def land(self, block_ids: Sequence[int]) -> None:
        """Make the landed bytes of these blocks visible in `pages`."""
        if self.pages is self.landing or not block_ids:
            return
        index = torch.tensor(block_ids, dtype=torch.int64)
        self.pages[:, :, index.to(self.device)] = self.landing[:, :, index].to(self.device)

    def digests(self, block_ids: Sequence[int], *, landed: bool = False) -> tuple[str, ...]:
        """BLAKE2b of each block's bytes, K and V of every layer, 16 hex digits each.

        Of the pages attention reads, or (`landed`) of what peers wrote, before `land`.
        """
        return tuple(_digest((self.landing if landed else self.pages)[:, :, block]) for block in block_ids)


def _digest(block: torch.Tensor) -> str:
    data = block.contiguous().cpu().view(torch.uint8)
    return hashlib.blake2b(data.numpy().data, digest_size=8).hexdigest()


def view_pages(layout: KVLayout, num_blocks: int, buffer: memoryview) -> torch.Tensor:
    """A buffer of `num_blocks * layout.block_bytes` bytes seen as the pages tensor; no copy."""
    shape = (layout.num_layers, 2, num_blocks, layout.num_kv_heads, layout.block_size, layout.head_dim)
    dtype = DTYPES[layout.dtype]
    count = num_blocks * layout.block_bytes // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)
