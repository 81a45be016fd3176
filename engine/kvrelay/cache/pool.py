"""Which KV blocks are free, how many owners each taken one has, and which still hold KV worth finding.

Knows block ids and names of contents (`cache.prefix`). Knows nothing about tensors, tokens or requests.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import Protocol

from kvrelay.cache.tiers import Content


class Backing(Protocol):
    """Where the contents of named blocks go when their room is needed, and come back from."""

    def save(self, name: bytes, block: int) -> list[bytes]:
        """Keep what the block holds; it is handed out for something else right after.

        Returns the names, this one among them or not, whose contents are not kept any more.
        """

    def names(self) -> set[bytes]:
        """The names of all contents kept, at first those of an earlier process."""

    def fetch(self, names: Sequence[bytes]) -> Iterator[Content]:
        """The contents of the longest run of names, from the first, that are kept: read as they are taken."""

    def fill(self, block: int, content: Content) -> None:
        """Write a content into a block."""

    def complete(self, blocks: Sequence[int], num_filled: int) -> None:
        """The last `num_filled` of a prefix's blocks have been filled, and are about to be shared."""

    def close(self, held: Sequence[tuple[bytes, int]]) -> None:
        """Keep, beyond this process where that can be, what these blocks hold, the longest unused first."""


class BlockPool:
    """Reference-counted block ids `0 … num_blocks-1`; the lowest free ids are handed out first.

    A block whose full content was `publish`ed under a name keeps it after its last owner has gone, and can
    be found and retained again, until it is handed out for something else: the longest unused first.

    With a `backing`, its content is saved there then, and brought back by `take`; it counts as held.

    `allocate` is paired with `can_allocate`: asking for more than is free is a bug of the caller.
    """

    def __init__(self, num_blocks: int, backing: Backing | None = None) -> None:
        self.num_blocks, self._backing = num_blocks, backing
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: dict[int, None] = {}  # named, without owner; the longest unused first
        self._references = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._holders: dict[bytes, int] = {}
        self._changes = dict.fromkeys(backing.names() if backing is not None else (), True)  # True: added
        self.peak_blocks = 0

    @property
    def num_free(self) -> int:
        """Blocks with no owner, those that keep a content included."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks with no owner that keep a content."""
        return len(self._idle)

    def can_allocate(self, count: int, beside: Collection[int] = ()) -> bool:
        """Whether `count` blocks are free now, not counting those of `beside`, which will be retained."""
        return count <= self.num_free - sum(block in self._idle for block in beside)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference and no name."""
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        blocks = [self._evict() for _ in range(count - len(self._free))]
        blocks += [self._free.pop() for _ in range(count - len(blocks))]
        blocks.sort()  # neighbours are copied in one go
        for block in blocks:
            self._references[block] = 1
        self._note_peak()
        return blocks

    def find(self, names: Iterable[bytes], multiple: int = 1) -> list[int]:
        """The blocks of the longest run of names, from the first, that are all held; not yet retained.

        A multiple of `multiple` blocks.
        """
        found = [self._holders[name] for name in takewhile(self._holders.__contains__, names)]
        return found[: len(found) // multiple * multiple]

    def take(self, names: Sequence[bytes], count: int, multiple: int = 1) -> tuple[list[int], int]:
        """`count` blocks for a sequence that begins with `names`, and how many of them, the first, are full.

        Those that are found are shared, the others allocated; of these, a run that the backing has is filled.
        """
        found = self.find(names)
        self.retain(found)
        blocks = found + self._fetch(names[len(found) :])
        num_full = len(blocks) // multiple * multiple
        self.release(found[num_full:])  # the rest of their unit is not there
        del blocks[num_full : len(found)]
        blocks += self.allocate(count - len(blocks))
        fetched = blocks[len(found) : num_full]
        if self._backing is not None and fetched:
            self._backing.complete(blocks[:num_full], len(fetched))
            self.publish(fetched, names[len(found) : num_full])
        return blocks, num_full

    def _fetch(self, names: Sequence[bytes]) -> list[int]:
        """Blocks filled with the run of names that the backing has; no content waits for its block."""
        blocks: list[int] = []
        if self._backing is not None:
            for content in self._backing.fetch(names):
                blocks += self.allocate(1)
                self._backing.fill(blocks[-1], content)
        return blocks

    def publish(self, blocks: Sequence[int], names: Sequence[bytes]) -> None:
        """Say what these taken blocks hold, now and until they are free. A held name stays put."""
        for block, name in zip(blocks, names, strict=True):
            assert self._references[block] > 0, f"block {block} is free and holds nothing"
            assert self._names[block] in (None, name), f"block {block} is shared and cannot change"
            if name not in self._holders:
                self._names[block], self._holders[name] = name, block
                self._changes[name] = True

    def retain(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block, taken or found."""
        for block in blocks:
            assert self._references[block] > 0 or block in self._idle, (
                f"block {block} is free and cannot be shared"
            )
            self._idle.pop(block, None)
            self._references[block] += 1
        self._note_peak()

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block; at zero it is free again, a named one to be found until used.

        The last of `blocks` counts as the longest unused: a prefix outlives what follows it.
        """
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0 and self._names[block] is None:
                self._free.append(block)
            elif self._references[block] == 0:
                self._idle[block] = None

    def take_changes(self, limit: int) -> tuple[list[bytes], list[bytes]]:
        """Names that came and names that went since the last call, at most `limit` together."""
        taken = dict(islice(self._changes.items(), limit))
        for name in taken:
            del self._changes[name]
        added = [name for name, is_added in taken.items() if is_added]
        return added, [name for name, is_added in taken.items() if not is_added]

    def close(self) -> None:
        """Leave what the named blocks without owner hold to the backing; nothing may be taken afterwards."""
        if self._backing is not None:
            names = [(self._names[block], block) for block in self._idle]
            self._backing.close([(name, block) for name, block in names if name is not None])

    def check(self) -> None:
        """Assert that every block is free, idle or owned, exactly one of them, and that names are sound."""
        free = [*self._free, *self._idle]
        assert len(set(free)) == len(free), "a block is twice on the free lists"
        for block, references in enumerate(self._references):
            assert references >= 0, f"block {block} has {references} references"
            assert (references == 0) == (block in free), (
                f"block {block}: {references} owners, free lists differ"
            )
            name = self._names[block]
            assert name is None or self._holders.get(name) == block, f"block {block} is not found by its name"
            assert name is not None or block not in self._idle, f"block {block} keeps nothing"
            assert name is None or block not in self._free, f"block {block} is named and on the free list"
        assert len(self._holders) == sum(name is not None for name in self._names), "a name without a block"

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        name = self._names[block]
        assert name is not None
        self._names[block] = None
        del self._holders[name]
        for lost in [name] if self._backing is None else self._backing.save(name, block):
            if lost not in self._holders:
                self._changes[lost] = False
        return block

    def _note_peak(self) -> None:
        self.peak_blocks = max(self.peak_blocks, self.num_blocks - self.num_free)
