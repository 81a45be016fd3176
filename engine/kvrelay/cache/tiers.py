"""Where evicted KV blocks wait to be found again: host memory, then files; both bounded.

Knows names of contents and bytes. Knows nothing of pages, tokens or requests.
"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvrelay.errors import InvalidConfig

MAGIC = b"kvrelay KV block 1\n"
DIGEST_BYTES = 16
SUFFIX = ".kvblock"
Content = bytes | bytearray | memoryview


class Tier(Protocol):
    """Keeps blocks' bytes by name, the longest unused out first."""

    name: str

    def put(self, name: bytes, data: Content) -> list[tuple[bytes, Content]]:
        """Keep `data`; the blocks that had to go for it (`data` itself, if it is too large)."""

    def get(self, name: bytes) -> Content | None:
        """The bytes, which become the last used; None when they are not here, or not whole any more."""


class HostTier:
    """Blocks in this process's memory, at most `max_bytes` of them together."""

    name = "host"

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[bytes, Content] = {}
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
        data = self._kept.pop(name, None)
        if data is not None:
            self._kept[name] = data
        return data


class FileTier:
    """One file per block in a directory that this tier alone uses; they are found again after a restart.

    A file is a magic line, a BLAKE2b digest of name and bytes, and the bytes. It is written beside and
    renamed into place, so that it is whole or not there; one that fails its digest is deleted and missing.

    Raises `InvalidConfig` when the directory cannot be made or read.
    """

    name = "file"

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._sizes: dict[bytes, int] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = sorted((path.stat().st_mtime_ns, path) for path in directory.glob(f"*{SUFFIX}"))
            for left_over in directory.glob("*.partial"):
                left_over.unlink()
        except OSError as error:
            raise InvalidConfig(f"kv_file_directory={str(directory)!r}: {error}") from error
        for _, path in found:
            if _is_hex(path.stem):
                self._sizes[bytes.fromhex(path.stem)] = path.stat().st_size
        self._shrink()

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    def put(self, name: bytes, data: Content) -> list[tuple[bytes, Content]]:
        size = len(MAGIC) + DIGEST_BYTES + len(data)
        if name in self._sizes or size > self._max_bytes:
            return []
        self._sizes[name] = size
        self._shrink()
        handle, partial = tempfile.mkstemp(suffix=".partial", dir=self._directory)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + _digest(name, data))
                file.write(data)
            os.replace(partial, self._path(name))
        except OSError:  # a full disk is no reason to fail a request: the block is not kept
            Path(partial).unlink(missing_ok=True)
            del self._sizes[name]
        return []

    def get(self, name: bytes) -> Content | None:
        size = self._sizes.pop(name, None)
        if size is None:
            return None
        path = self._path(name)
        try:
            content = bytearray(path.read_bytes())
        except OSError:
            return None
        header = len(MAGIC) + DIGEST_BYTES
        data = content[header:]
        if content[:header] != MAGIC + _digest(name, data):
            path.unlink(missing_ok=True)
            return None
        self._sizes[name] = size
        return data

    def _shrink(self) -> None:
        num_bytes = self.num_bytes
        while num_bytes > self._max_bytes:
            oldest = next(iter(self._sizes))
            num_bytes -= self._sizes.pop(oldest)
            self._path(oldest).unlink(missing_ok=True)

    def _path(self, name: bytes) -> Path:
        return self._directory / f"{name.hex()}{SUFFIX}"


class Tiers:
    """Tiers one below the other: what one drops goes to the next. `counters` counts hits by tier."""

    def __init__(self, tiers: Sequence[Tier], counters: Counter[str]) -> None:
        self._tiers, self._counters = tiers, counters

    def put(self, name: bytes, data: Content) -> None:
        """Keep a block that the pool gives up."""
        moving: list[tuple[bytes, Content]] = [(name, data)]
        for tier in self._tiers:
            moving = [dropped for each in moving for dropped in tier.put(*each)]

    def get(self, names: Sequence[bytes], num_bytes: int) -> list[Content]:
        """The bytes of the longest run of names, from the first, that are kept, `num_bytes` each."""
        found: list[Content] = []
        for name in names:
            data = self._get(name)
            if data is None or len(data) != num_bytes:
                break
            found.append(data)
        return found

    def _get(self, name: bytes) -> Content | None:
        for tier in self._tiers:
            data = tier.get(name)
            if data is not None:
                self._counters[f"tier_hits_{tier.name}"] += 1
                return data
        return None


def _digest(name: bytes, data: Content) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=name).digest()


def _is_hex(text: str) -> bool:
    try:
        return bytes.fromhex(text).hex() == text
    except ValueError:
        return False
