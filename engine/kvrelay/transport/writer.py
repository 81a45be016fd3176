"""What transports share: one thread that copies pages in order, forgets a ticket when told, and its events.

It can be held to the pace of a slower link: then a write's bytes arrive as late as they would there.
"""

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

from kvrelay import codec
from kvrelay.cache.memory import KVMemory
from kvrelay.cache.store import KVStore
from kvrelay.errors import InvalidConfig, LayoutMismatch, ProtocolError, TransportError
from kvrelay.transport.base import Notice, Site, TransportEvent, Write, WriteDone, WriteFailed
from kvrelay.transport.copying import copy_layer, num_bytes
from kvrelay.types import TicketId, WorkerId
from kvrelay.wakeup import Wakeup
from kvrelay.wire import Descriptor

INLINE_BYTES = 128 << 10  # so much is copied in less time than waking a thread takes
MAX_GBIT_PER_S = 1e6


class PageWriter:
    """Copies posted writes on its own thread; `peers` holds those that are connected.

    `copy(source memory, the peer's, write)` copies one write and returns its bytes, or raises. Where it is
    `copy_layer`, `peers` holds their memories.

    A small write that nothing is waiting before, and that waits for nothing, `copy_layer` copies at once, on
    its poster's thread.

    `options` are a transport's: `gbit_per_s` is the pace of the link, in 10^9 bits; without it, the host's.
    Raises `InvalidConfig`, naming the option, before a thread is started.
    """

    def __init__(
        self, site: Site, options: dict[str, str], copy: Callable[[KVMemory, Any, Write], int] | None = None
    ) -> None:
        self._site, self._bytes_per_s = site, _pace(options)
        self.peers: dict[WorkerId, Any] = {}
        self._copy_write = copy or copy_layer
        self.source: KVMemory | None = None
        self.wakeup = Wakeup()
        self.counters: Counter[str] = Counter()
        self._urgent = OrderedDict[int, Write]()  # by identity: one is withdrawn without a search
        self._queue = OrderedDict[int, Write]()
        self._events: deque[TransportEvent] = deque()
        self._changed = threading.Condition()
        self._on_link: Write | None = None
        self._active: TicketId | None = None
        self._mine: Descriptor | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"{site.worker_id}-writer", daemon=True)
        self._thread.start()

    def register(self, store: KVStore, address: dict[str, str | int]) -> Descriptor:
        """Copy from this store from now on; the descriptor for peers, `address` in the transport's words."""
        self.source = store.memory
        self._mine = Descriptor(
            worker_id=self._site.worker_id,
            epoch=self._site.epoch,
            layout=store.layout,
            num_blocks=store.num_blocks,
            keeps_stats=store.keeps_stats,
            address=address,
        )
        return self._mine

    def check_layout(self, peer: Descriptor) -> None:
        """Refuse a peer whose pages differ, naming the fields. Raises `LayoutMismatch`."""
        mine = self._mine
        assert mine is not None, "register comes before connect"
        if mine.layout.fingerprint() != peer.layout.fingerprint():
            difference = mine.layout.difference(peer.layout)
            raise LayoutMismatch(f"{mine.worker_id} and {peer.worker_id} hold different KV: {difference}")

    def write(self, write: Write) -> None:
        """Queue one write. Raises `TransportError` when the peer is not connected."""
        if write.peer not in self.peers:
            raise TransportError(f"not connected to {write.peer}; connected: {sorted(self.peers)}")
        parts = write.source_blocks if write.parts is None else write.parts
        if not len(write.source_blocks) == len(write.target_blocks) == len(parts):
            lengths = f"{len(write.source_blocks)} blocks into {len(write.target_blocks)}"
            raise TransportError(f"{lengths}, parts {write.parts}")
        with self._changed:
            if self._urgent or self._queue or self._active is not None or not self._is_small(write):
                (self._urgent if write.is_urgent else self._queue)[id(write)] = write
                self._changed.notify_all()
                return
        self.report(self._copy(write, time.monotonic()))  # only the poster fills and cancels: alone

    def _is_small(self, write: Write) -> bool:
        if self._copy_write is not copy_layer or self._bytes_per_s is not None:
            return False
        if self.source is None or write.ready is not None:
            return False
        return num_bytes(self.source, write) <= INLINE_BYTES

    def withdraw(self, write: Write) -> bool:
        """Take a write out of the queue; False when it is not there (any more)."""
        with self._changed:
            return any(queue.pop(id(write), None) is not None for queue in (self._urgent, self._queue))

    def cancel(self, ticket_id: TicketId) -> None:
        """Forget the ticket's queued writes and outcomes; wait for the one in progress."""
        with self._changed:
            for queue in (self._urgent, self._queue):
                for write in [write for write in queue.values() if write.ticket_id == ticket_id]:
                    del queue[id(write)]
            if self._on_link is not None and self._on_link.ticket_id == ticket_id:
                self._on_link = None
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._active != ticket_id)
            self._events = deque(event for event in self._events if _ticket(event) != ticket_id)

    def hear(self, message: bytes) -> None:
        """Report a peer's notification; one that is none is counted and left."""
        try:
            self.report(Notice(codec.decode(message, "notification")))
        except ProtocolError:
            self.counters["rejected_notifications"] += 1

    def report(self, event: TransportEvent) -> None:
        """Have the next `poll` return the event; from any thread."""
        with self._changed:
            self._events.append(event)
        self.wakeup.set()

    def poll(self) -> list[TransportEvent]:
        """Events since the last call."""
        self.wakeup.clear()
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

    def telemetry(self) -> dict[str, int]:
        """Counters since the start; bytes and nanoseconds are integers, so that they add exactly."""
        return dict(self.counters)

    def close(self) -> None:
        """Finish the write in progress, drop the rest, join the thread. Safe to call twice."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._urgent.clear()
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join()
        self.peers.clear()
        self.source = None
        self.wakeup.close()

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            event = self._copy(*taken)
            with self._changed:
                self._active = None
                self._events.append(event)
                self._changed.notify_all()
            self.wakeup.set()

    def _next(self) -> tuple[Write, float] | None:
        """The next write whose bytes have had their time on the link, and when that began."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or bool(self._urgent or self._queue))
                if self._closed:
                    return None
                write = (self._urgent or self._queue).popitem(last=False)[1]
                start_s = time.monotonic()
                if self._bytes_per_s is None or self._has_passed(write, start_s):
                    self._active = write.ticket_id
                    return write, start_s

    def _has_passed(self, write: Write, start_s: float) -> bool:
        """Wait for the write's time on the link, lock released; False when it was cancelled meanwhile."""
        assert self._bytes_per_s is not None
        assert self.source is not None
        self._on_link = write
        end_s = start_s + num_bytes(self.source, write) / self._bytes_per_s
        while not self._closed and self._on_link is write and (left_s := end_s - time.monotonic()) > 0:
            self._changed.wait(left_s)
        has_passed = self._on_link is write and not self._closed
        self._on_link = None
        return has_passed

    def _copy(self, write: Write, start_s: float) -> TransportEvent:
        assert self.source is not None, "a store is registered before anything is written"
        try:
            if write.ready is not None:
                write.ready()
                start_s = start_s if self._bytes_per_s else time.monotonic()
            cpu_s = time.thread_time()
            moved = self._copy_write(self.source, self.peers[write.peer], write)
        except Exception as error:  # noqa: BLE001  whatever it is, the write ends, and the thread goes on
            return WriteFailed(write, f"{type(error).__name__}: {error}")
        end_s = time.monotonic()
        self.counters["writes"] += 1
        self.counters["bytes_written"] += moved
        self.counters["write_ns"] += int((end_s - start_s) * 1e9)
        return WriteDone(write, moved, start_s, end_s, time.thread_time() - cpu_s)


def _pace(options: dict[str, str]) -> float | None:
    """Bytes per second from a transport's options. Raises `InvalidConfig`."""
    unknown = sorted(options.keys() - {"gbit_per_s"})
    if unknown:
        raise InvalidConfig(f"transport: there is no option {unknown[0]!r}; there is gbit_per_s")
    if "gbit_per_s" not in options:
        return None
    try:
        gbit_per_s = float(options["gbit_per_s"])
    except ValueError:
        gbit_per_s = -1.0
    if not 0.0 < gbit_per_s <= MAX_GBIT_PER_S:
        needed = f"a number above 0, at most {MAX_GBIT_PER_S:g}"
        raise InvalidConfig(f"transport: gbit_per_s={options['gbit_per_s']!r}: expected {needed}")
    return gbit_per_s * 1e9 / 8


def _ticket(event: TransportEvent) -> TicketId | None:
    return event.write.ticket_id if isinstance(event, WriteDone | WriteFailed) else None
