"""Connects the pool, the pages and the tiers: blocks given up are copied out, found ones in."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvrelay.cache.file_tier import HEADER_BYTES, FileTier
from kvrelay.cache.store import KVStore
from kvrelay.cache.tiers import Content, HostTier, Tier, Tiers
from kvrelay.config import WorkerConfig
from kvrelay.errors import InvalidConfig
from kvrelay.types import BLOCK_SIZE

CLOSE_S = 5.0  # a worker that stops has so long to write its blocks to files


class PageBacking:
    """See `kvrelay.cache.pool.Backing`. `files` is the tier that outlives the process, if there is one.

    `after_each` is called between the blocks of a prefix that comes back, however slow the disk.
    """

    def __init__(self, store: KVStore, tiers: Tiers, files: FileTier | None = None) -> None:
        self._store, self._tiers, self._files = store, tiers, files
        self.after_each: Callable[[], None] = lambda: None

    def save(self, name: bytes, block: int) -> list[bytes]:
        return self._tiers.put(name, self._store.read_block(block))

    def names(self) -> set[bytes]:
        return self._tiers.names()

    def fetch(self, names: Sequence[bytes]) -> Iterator[Content]:
        return self._tiers.get(names, self._store.layout.block_bytes)

    def fill(self, block: int, content: Content) -> None:
        self._store.write_block(block, content)
        self.after_each()

    def complete(self, blocks: Sequence[int], num_filled: int) -> None:
        self._store.refresh_stats(blocks, len(blocks) * BLOCK_SIZE, num_filled * BLOCK_SIZE)

    def close(self, held: Sequence[tuple[bytes, int]]) -> None:
        if self._files is None:
            return
        deadline_s = time.monotonic() + CLOSE_S
        for name, block in held:
            self.save(name, block)
            if not self._files.wait(deadline_s - time.monotonic()):
                break
        for _ in self._tiers.settle():
            if not self._files.wait(deadline_s - time.monotonic()):
                break
        self.let_go()

    def let_go(self) -> None:
        """Leave the files to others, whatever has not been written; safe to call twice."""
        if self._files is not None:
            self._files.close()


def open_backing(config: WorkerConfig, store: KVStore, counters: Counter[str]) -> PageBacking | None:
    """The tiers that the settings ask for; None for none.

    Raises `InvalidConfig` for a bad directory, and for a tier that not even one block fits in.
    """
    engine, block = config.engine, store.layout.block_bytes
    for field, least in (("kv_host_bytes", block), ("kv_file_bytes", block + HEADER_BYTES)):
        if 0 < getattr(engine, field) < least:
            raise InvalidConfig(
                f"{field}={getattr(engine, field)}: expected 0 or at least {least} bytes, "
                f"{BLOCK_SIZE} tokens of this model's KV"
            )
    tiers: list[Tier] = []
    files: FileTier | None = None
    if engine.kv_host_bytes:
        tiers.append(HostTier(engine.kv_host_bytes))
    if engine.kv_file_bytes and engine.kv_file_directory is not None:
        directory = Path(engine.kv_file_directory).expanduser() / config.worker_id
        files = FileTier(directory, engine.kv_file_bytes)
        tiers.append(files)
    return PageBacking(store, Tiers(tiers, counters), files) if tiers else None
