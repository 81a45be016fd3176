"""Where evicted KV blocks wait to be found again: host memory, then files; both bounded.

Knows names of contents and bytes. Knows nothing of pages, tokens or requests.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

Content = bytes | bytearray | memoryview


class Tier(Protocol):
    """Keeps blocks' bytes by name, the longest unused out first; before it, those that were read.

    Whoever read a block has it, and puts it back when it goes there: until then this copy is needed least.
    """

    name: str

    def put(self, name: bytes, data: Content) -> list[tuple[bytes, Content]]:
        """Keep `data`, now the last used; the blocks that went for it (`data` itself where there is no room).

        The bytes of a block that went are empty where the tier has them no longer.
        """

    def get(self, name: bytes) -> Content | None:
        """The bytes, now the first to go; None when they are not here, or not whole any more."""

    def __contains__(self, name: bytes) -> bool:
        """Whether the tier keeps a block of that name."""

    def __iter__(self) -> Iterator[bytes]:
        """The names of the blocks kept, the first to go first."""


class HostTier:
    """Blocks in this process's memory, at most `max_bytes` of them together."""

    name = "host"

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Content] = OrderedDict()
        self.num_bytes = 0

    def put(self, name: bytes, data: Content) -> list[tuple[bytes, Content]]:
        previous = self._kept.pop(name, b"")
        self._kept[name] = data
        self.num_bytes += len(data) - len(previous)
        dropped: list[tuple[bytes, Content]] = []
        while self.num_bytes > self._max_bytes:
            oldest = next(iter(self._kept))
            dropped.append((oldest, self._kept.pop(oldest)))
            self.num_bytes -= len(dropped[-1][1])
        return dropped

    def get(self, name: bytes) -> Content | None:
        data = self._kept.get(name)
        if data is not None:
            self._kept.move_to_end(name, last=False)
        return data

    def __contains__(self, name: bytes) -> bool:
        return name in self._kept

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._kept))


class Tiers:
    """Tiers one below the other: what one drops goes to the next. `counters` counts hits by tier."""

    def __init__(self, tiers: Sequence[Tier], counters: Counter[str]) -> None:
        self._tiers, self._counters = tiers, counters

    def put(self, name: bytes, data: Content) -> list[bytes]:
        """Keep a block that the pool gives up; the names of those that are kept nowhere any more."""
        return self._put(self._tiers, name, data)

    def names(self) -> set[bytes]:
        """The names of all blocks kept."""
        return {name for tier in self._tiers for name in tier}

    def settle(self) -> Iterator[bytes]:
        """Move all blocks down to the last tier, one at each step, the first to go first."""
        for level, tier in enumerate(self._tiers[:-1], start=1):
            for name in tier:
                data = tier.get(name)
                assert data is not None, "what a tier names in memory it has"
                self._put(self._tiers[level:], name, data)
                yield name

    def _put(self, tiers: Sequence[Tier], name: bytes, data: Content) -> list[bytes]:
        moving: list[tuple[bytes, Content]] = [(name, data)]
        for tier in tiers:
            moving = [dropped for each in moving for dropped in tier.put(*each)]
        return [name for name, _ in moving if not any(name in tier for tier in self._tiers)]

    def get(self, names: Sequence[bytes], num_bytes: int) -> Iterator[Content]:
        """The bytes of the longest run of names, from the first, that are kept, `num_bytes` each.

        Each is read when it is asked for.
        """
        for name in names:
            data = self._get(name)
            if data is None or len(data) != num_bytes:
                return
            yield data

    def _get(self, name: bytes) -> Content | None:
        for tier in self._tiers:
            data = tier.get(name)
            if data is not None:
                self._counters[f"tier_hits_{tier.name}"] += 1
                return data
        return None
