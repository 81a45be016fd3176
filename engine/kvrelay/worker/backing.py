"""Connects the pool, the pages and the tiers: blocks given up are copied out, found ones in."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kvrelay.cache.store import KVStore
from kvrelay.cache.tiers import Content, FileTier, HostTier, Tier, Tiers
from kvrelay.config import WorkerConfig
from kvrelay.types import BLOCK_SIZE


class PageBacking:
    """See `kvrelay.cache.pool.Backing`."""

    def __init__(self, store: KVStore, tiers: Tiers) -> None:
        self._store, self._tiers = store, tiers

    def save(self, name: bytes, block: int) -> None:
        self._tiers.put(name, self._store.read_block(block))

    def fetch(self, names: Sequence[bytes]) -> list[Content]:
        return self._tiers.get(names, self._store.layout.block_bytes)

    def fill(self, blocks: Sequence[int], contents: Sequence[Content]) -> None:
        for block, content in zip(blocks[len(blocks) - len(contents) :], contents, strict=True):
            self._store.write_block(block, content)
        self._store.refresh_stats(blocks, len(blocks) * BLOCK_SIZE)


def open_backing(config: WorkerConfig, store: KVStore, counters: Counter[str]) -> PageBacking | None:
    """The tiers that the settings ask for; None for none. Raises `InvalidConfig` for a bad directory."""
    engine = config.engine
    tiers: list[Tier] = []
    if engine.kv_host_bytes:
        tiers.append(HostTier(engine.kv_host_bytes))
    if engine.kv_file_bytes and engine.kv_file_directory is not None:
        directory = Path(engine.kv_file_directory).expanduser() / config.worker_id
        tiers.append(FileTier(directory, engine.kv_file_bytes))
    return PageBacking(store, Tiers(tiers, counters)) if tiers else None
