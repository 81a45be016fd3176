"""KV blocks in files: written by a thread of its own, whole or not there, found again after a restart.

Knows names of contents and bytes. Knows nothing of pages, tokens or requests.
"""

import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from kvrelay.cache.tiers import Content
from kvrelay.errors import InvalidConfig

MAGIC = b"kvrelay KV block 2\n"
DIGEST_BYTES = 16
HEADER_BYTES = len(MAGIC) + DIGEST_BYTES
SUFFIX = ".kvblock"
LOCK = "lock"
LOCK_WAIT_S = 8.0  # workers whose engine was killed may write for five seconds yet
MAX_UNWRITTEN_BYTES = 256 << 20  # blocks that come faster than the disk takes them are not kept


class FileTier:
    """One file per block in a directory that this tier alone may use; see `kvrelay.cache.tiers.Tier`.

    A file is a magic line, a SHA-256 digest of name and bytes, and the bytes. It is written beside and
    renamed into place; one that fails its digest is deleted and missing. Writing and deleting is the work of
    a thread; until a block is in its file it is found in memory. Reading is the caller's.

    Raises `InvalidConfig` when the directory cannot be made or read, or is in use: two could not keep to one
    limit.
    """

    name = "file"

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._lock = _locked(directory)
        try:
            self._sizes = _found(directory)
        except InvalidConfig:
            os.close(self._lock)
            raise
        self._num_bytes = sum(self._sizes.values())
        self._unwritten: dict[bytes, Content] = {}
        self._unwritten_bytes = 0
        self._due: deque[bytes] = deque()  # names whose file may not be as `_sizes` and `_unwritten` say
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kv-files", daemon=True)
        with self._changed:
            self._shrink()
        self._thread.start()

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, those still to be written included."""
        with self._changed:
            return self._num_bytes

    def put(self, name: bytes, data: Content) -> list[tuple[bytes, Content]]:
        size = HEADER_BYTES + len(data)
        with self._changed:
            if name in self._sizes:
                self._sizes.move_to_end(name)
                return []
            if size > self._max_bytes or self._unwritten_bytes + len(data) > MAX_UNWRITTEN_BYTES:
                return [(name, data)]
            self._sizes[name], self._unwritten[name] = size, data
            self._num_bytes += size
            self._unwritten_bytes += len(data)
            self._due.append(name)
            dropped = self._shrink()
            self._changed.notify_all()
        return dropped

    def get(self, name: bytes) -> Content | None:
        with self._changed:
            size = self._sizes.get(name)
            if size is None:
                return None
            self._sizes.move_to_end(name, last=False)
            if name in self._unwritten:
                return self._unwritten[name]
        data = _read(self._path(name), name, size)
        if data is None:
            with self._changed:
                self._drop(name)
            with suppress(OSError):  # where nothing can be deleted it is missing all the same
                self._path(name).unlink()
        return data

    def __contains__(self, name: bytes) -> bool:
        with self._changed:
            return name in self._sizes

    def __iter__(self) -> Iterator[bytes]:
        with self._changed:
            return iter(list(self._sizes))

    def wait(self, timeout_s: float) -> bool:
        """Wait until every file is as it should be; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._due, timeout_s)

    def close(self) -> None:
        """Finish the file in progress and join the thread: what has not been waited for is not kept.

        Lets the directory go. Safe to call twice.
        """
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        os.close(self._lock)

    def _shrink(self) -> list[tuple[bytes, Content]]:
        """Give up the longest unused; called with the lock held."""
        dropped: list[tuple[bytes, Content]] = []
        while self._num_bytes > self._max_bytes:
            oldest = next(iter(self._sizes))
            self._drop(oldest)
            self._forget(oldest)
            self._due.append(oldest)
            dropped.append((oldest, b""))
        return dropped

    def _drop(self, name: bytes) -> None:
        self._num_bytes -= self._sizes.pop(name, 0)

    def _forget(self, name: bytes) -> None:
        self._unwritten_bytes -= len(self._unwritten.pop(name, b""))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or bool(self._due))
                if self._is_closed:
                    return
                name = self._due[0]
                data, is_kept = self._unwritten.get(name), name in self._sizes
            try:
                if data is not None:
                    _write(self._path(name), name, data)
                elif not is_kept:
                    self._path(name).unlink(missing_ok=True)
            except OSError:  # a full disk is no reason to fail a request: the block is not kept
                with self._changed:
                    if data is not None and self._unwritten.get(name) is data:  # not put anew since
                        self._drop(name)
            with self._changed:
                self._due.popleft()
                if self._unwritten.get(name) is data:
                    self._forget(name)
                self._changed.notify_all()

    def _path(self, name: bytes) -> Path:
        return self._directory / f"{name.hex()}{SUFFIX}"


def _locked(directory: Path) -> int:
    """The directory's lock, locked until it is closed or the process ends; the directory is made.

    A file open for writing: over NFS no other can be locked.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        opened = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, mode=0o600)
    except OSError as error:
        raise InvalidConfig(f"kv_file_directory={str(directory)!r}: {error}") from error
    deadline_s = time.monotonic() + LOCK_WAIT_S
    try:
        while not _lock(opened):
            if time.monotonic() > deadline_s:
                raise BlockingIOError("another engine uses it")
            time.sleep(0.05)
    except OSError as error:
        os.close(opened)
        raise InvalidConfig(f"kv_file_directory={str(directory)!r}: {error}") from error
    return opened


def _lock(opened: int) -> bool:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _found(directory: Path) -> OrderedDict[bytes, int]:
    """The blocks left by an earlier process and their files' sizes, the first written first."""
    try:
        found = sorted((path.stat().st_mtime_ns, path) for path in directory.glob(f"*{SUFFIX}"))
        for left_over in directory.glob("*.partial"):
            left_over.unlink()
        blocks = [path for _, path in found if _is_hex(path.stem) and path.is_file()]
        return OrderedDict((bytes.fromhex(path.stem), path.stat().st_size) for path in blocks)
    except OSError as error:
        raise InvalidConfig(f"kv_file_directory={str(directory)!r}: {error}") from error


def _write(path: Path, name: bytes, data: Content) -> None:
    handle, partial = tempfile.mkstemp(suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + _digest(name, data))
            file.write(data)
        os.replace(partial, path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise


def _read(path: Path, name: bytes, size: int) -> Content | None:
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != size:  # grown or cut since: not by this tier
                return None
            content = bytearray(size)
            file.readinto(content)
    except OSError:
        return None
    data = memoryview(content)[HEADER_BYTES:]
    return data if content[:HEADER_BYTES] == MAGIC + _digest(name, data) else None


def _digest(name: bytes, data: Content) -> bytes:
    digest = hashlib.sha256(name)  # the fastest of `hashlib` where the processor has instructions for it
    digest.update(data)
    return digest.digest()[:DIGEST_BYTES]


def _is_hex(text: str) -> bool:
    try:
        return bytes.fromhex(text).hex() == text
    except ValueError:
        return False
