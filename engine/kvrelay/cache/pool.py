"""Which KV blocks are free, and how many owners each taken one has.

Knows block ids only. Knows nothing about tensors, tokens or requests.
"""

from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted block ids `0 … num_blocks-1`; the lowest free ids are handed out first.

    `allocate` is paired with `can_allocate`: asking for more than is free is a bug of the caller.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self.peak_blocks = 0

    @property
    def num_free(self) -> int:
        """Blocks with no owner."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether `count` blocks are free now."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference."""
        assert 0 <= count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        self.peak_blocks = max(self.peak_blocks, self.num_blocks - len(self._free))
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """Add one reference to each taken block."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free and cannot be shared"
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block; at zero it is free again."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def check(self) -> None:
        """Assert that every block is either free, once, or has an owner."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice on the free list"
        for block, references in enumerate(self._references):
            assert references >= 0, f"block {block} has {references} references"
            assert (references == 0) == (block in free), f"block {block}: {references} owners, free list differs"
