"""Worker processes on one host: decode's pages are memory that prefill maps and writes in place.

The memory is an anonymous `memfd`, reached through `/proc/PID/fd/N`: it has no name, so nothing is left
behind however a process ends, and the size of `/dev/shm` does not limit it. Notifications travel over a
ZeroMQ socket in the engine's private run directory. Linux only.
"""

import mmap
import os
import sys
from typing import Any

import zmq

from kvrelay import codec
from kvrelay.cache.memory import KVMemory, memory_bytes
from kvrelay.cache.store import KVStore, pin
from kvrelay.errors import TransportError
from kvrelay.transport.base import Site, TransportEvent
from kvrelay.transport.writer import PageWriter
from kvrelay.types import WorkerId
from kvrelay.wire import Descriptor, Notification


class ShmTransport:
    """See `Transport`."""

    def __init__(self, site: Site, options: dict[str, str]) -> None:
        if not sys.platform.startswith("linux"):
            raise TransportError(f"shm needs Linux (memfd and /proc); this is {sys.platform}")
        self._file = -1
        self.writer = writer = PageWriter(site, options)
        self.write, self.withdraw, self.cancel = writer.write, writer.withdraw, writer.cancel
        self.telemetry = writer.telemetry
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        self._endpoint = f"ipc://{site.run_directory}/kv-{site.worker_id}-{site.epoch}"
        self._inbox.bind(self._endpoint)
        self._outboxes: dict[WorkerId, zmq.Socket[bytes]] = {}

    def allocate(self, num_bytes: int) -> memoryview:
        self._file = os.memfd_create("kvrelay-pages", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._file, num_bytes)
            return memoryview(mmap.mmap(self._file, num_bytes))
        except OSError as error:
            raise TransportError(f"cannot map {num_bytes} bytes for KV pages: {error}") from error

    def register(self, store: KVStore) -> Descriptor:
        address: dict[str, str | int] = {
            "pid": os.getpid(),
            "file": self._file,
            "inode": os.fstat(self._file).st_ino,
            "endpoint": self._endpoint,
        }
        return self.writer.register(store, address)

    def connect(self, peer: Descriptor) -> None:
        self.writer.check_layout(peer)
        missing = {"pid", "file", "inode", "endpoint"} - peer.address.keys()
        if missing:
            raise TransportError(f"the descriptor of {peer.worker_id} lacks {', '.join(sorted(missing))}")
        buffer = _map_peer(peer)
        memory = KVMemory.view(peer.layout, peer.num_blocks, buffer, keeps_stats=peer.keeps_stats)
        if self.writer.source is not None and self.writer.source.pages.is_cuda:
            pin(memory.pages)
        outbox = self._context.socket(zmq.PUSH)
        outbox.setsockopt(zmq.LINGER, 0)
        outbox.setsockopt(zmq.SNDHWM, 0)  # a burst of leases must not fail a good transfer
        try:
            outbox.connect(str(peer.address["endpoint"]))
        except zmq.ZMQError as error:
            outbox.close()
            raise TransportError(f"{peer.address['endpoint']!r} of {peer.worker_id}: {error}") from error
        previous = self._outboxes.pop(peer.worker_id, None)
        if previous is not None:
            previous.close()
        self.writer.peers[peer.worker_id] = memory
        self._outboxes[peer.worker_id] = outbox

    def notify(self, peer: WorkerId, message: Notification) -> None:
        outbox = self._outboxes.get(peer)
        if outbox is None:
            raise TransportError(f"not connected to {peer}; connected: {sorted(self._outboxes)}")
        try:
            outbox.send(codec.encode(message), zmq.DONTWAIT)
        except zmq.Again:
            raise TransportError(f"{peer} does not read its notifications") from None
        self.writer.counters["notifications"] += 1

    def poll(self) -> list[TransportEvent]:
        while self._inbox.poll(0):
            self.writer.hear(self._inbox.recv())
        return self.writer.poll()

    def pollables(self) -> list[Any]:
        return [self.writer.wakeup.fileno(), self._inbox]

    def close(self) -> None:
        if self._context.closed:
            return
        self.writer.close()
        self._context.destroy(linger=0)
        if self._file >= 0:
            os.close(self._file)


def _map_peer(peer: Descriptor) -> memoryview:
    """The peer's memory, checked to be the file that the descriptor means and long enough."""
    try:
        path = f"/proc/{int(peer.address['pid'])}/fd/{int(peer.address['file'])}"
    except ValueError as error:
        raise TransportError(f"the descriptor of {peer.worker_id} is malformed: {error}") from error
    num_bytes = memory_bytes(peer.layout, peer.num_blocks, keeps_stats=peer.keeps_stats)
    try:
        file = os.open(path, os.O_RDWR)
    except OSError as error:
        raise TransportError(f"cannot reach the pages of {peer.worker_id} at {path}: {error}") from error
    try:
        status = os.fstat(file)
        if status.st_ino != peer.address["inode"] or status.st_size < num_bytes:
            raise TransportError(f"{path} is not the memory of {peer.worker_id}: did that process end?")
        return memoryview(mmap.mmap(file, num_bytes))
    finally:
        os.close(file)
