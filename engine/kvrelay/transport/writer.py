"""One thread that copies pages into mapped peer memory, in order, and can be told to forget a ticket.

Shared by every transport whose peers are reachable by plain loads and stores. It can be held to the pace of a
slower link: then a write's bytes arrive as late as they would there.
"""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kvrelay.cache.memory import NUM_VECTORS, KVMemory
from kvrelay.errors import InvalidConfig, TransportError
from kvrelay.transport.base import Telemetry, TransportEvent, Write, WriteDone, WriteFailed
from kvrelay.types import TicketId, WorkerId
from kvrelay.wakeup import Wakeup

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
        self, name: str, options: dict[str, str], copy: Callable[[KVMemory, Any, Write], int] | None = None
    ) -> None:
        self._bytes_per_s = _pace(options)
        self.peers: dict[WorkerId, Any] = {}
        self._copy_write = copy or copy_layer
        self.source: KVMemory | None = None
        self.wakeup = Wakeup()
        self.telemetry = Telemetry()
        self._urgent: deque[Write] = deque()
        self._queue: deque[Write] = deque()
        self._events: deque[TransportEvent] = deque()
        self._changed = threading.Condition()
        self._on_link: Write | None = None
        self._active: TicketId | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-writer", daemon=True)
        self._thread.start()

    def submit(self, write: Write) -> None:
        """Queue one write. Raises `TransportError` when the peer is not connected."""
        if write.peer not in self.peers:
            raise TransportError(f"not connected to {write.peer}; connected: {sorted(self.peers)}")
        if len({len(each) for each in (write.source_blocks, write.target_blocks, *_listed(write))}) > 1:
            lengths = f"{len(write.source_blocks)} blocks into {len(write.target_blocks)}"
            raise TransportError(f"{lengths}, parts {write.parts}")
        with self._changed:
            if self._urgent or self._queue or self._active is not None or not self._is_small(write):
                (self._urgent if write.is_urgent else self._queue).append(write)
                self._changed.notify_all()
                return
        event = self._copy(write, time.monotonic())  # only the poster fills and cancels: alone
        with self._changed:
            self._events.append(event)
        self.wakeup.set()

    def _is_small(self, write: Write) -> bool:
        if self._copy_write is not copy_layer or self._bytes_per_s is not None:
            return False
        if self.source is None or write.ready is not None:
            return False
        return num_bytes(self.source, write) <= INLINE_BYTES

    def withdraw(self, write: Write) -> bool:
        """Take a write out of the queue; False when it is not there (any more)."""
        with self._changed:
            for queue in (self._urgent, self._queue):
                for index, queued in enumerate(queue):
                    if queued is write:
                        del queue[index]
                        return True
        return False

    def cancel(self, ticket_id: TicketId) -> None:
        """Forget the ticket's queued writes and outcomes; wait for the one in progress."""
        with self._changed:
            self._urgent = deque(write for write in self._urgent if write.ticket_id != ticket_id)
            self._queue = deque(write for write in self._queue if write.ticket_id != ticket_id)
            if self._on_link is not None and self._on_link.ticket_id == ticket_id:
                self._on_link = None
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._active != ticket_id)
            self._events = deque(event for event in self._events if _ticket(event) != ticket_id)

    def drain(self) -> list[TransportEvent]:
        """Outcomes since the last call."""
        self.wakeup.clear()
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

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
                write = (self._urgent or self._queue).popleft()
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
        self.telemetry.add("writes")
        self.telemetry.add("bytes_written", moved)
        self.telemetry.add("write_ns", int((end_s - start_s) * 1e9))
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


def num_bytes(source: KVMemory, write: Write) -> int:
    """Bytes that the write copies."""
    if write.parts is None or not write.parts:
        return len(write.source_blocks) * 2 * source.pages[0, 0, 0].nbytes
    heads, head_dim = source.pages.shape[3], source.pages.shape[5]
    if write.parts[0] < 2 * heads:
        return len(write.parts) * source.pages[0, 0, 0, 0].nbytes
    return len(write.parts) * heads * (NUM_VECTORS * head_dim + 1) * source.pages.itemsize


def copy_layer(source: KVMemory, target: KVMemory, write: Write) -> int:
    """Copy the write's blocks between two memories; the number of bytes.

    Raises `IndexError`, before anything is copied, when a layer, part or block lies outside either.
    """
    pages, landing = source.pages, target.pages
    check_inside("layer", [write.layer], min(pages.shape[0], landing.shape[0]))
    check_inside("source block", write.source_blocks, pages.shape[2])
    check_inside("target block", write.target_blocks, landing.shape[2])
    if write.parts:
        has_stats = min(len(source.vectors), len(target.vectors)) > 0
        check_inside("part", write.parts, 2 * pages.shape[3] + has_stats)
        blocks = list(zip(write.source_blocks, write.target_blocks, strict=True))
        return target.copy(source, write.layer, write.parts, blocks)
    for half in range(2):  # K, then V
        stretches = runs(write.source_blocks, write.target_blocks)
        if pages.is_cuda:
            for first, place, count in stretches:
                landing[write.layer, half, place : place + count].copy_(
                    pages[write.layer, half, first : first + count]
                )
        else:
            _copy_in_memory(pages[write.layer, half], landing[write.layer, half], stretches)
    return num_bytes(source, write)


def _copy_in_memory(
    pages: torch.Tensor, landing: torch.Tensor, stretches: Iterator[tuple[int, int, int]]
) -> None:
    """One `memmove` per stretch, the GIL released: a tensor copy of one page costs five times its bytes."""
    size, pages_at, landing_at = pages[0].nbytes, pages.data_ptr(), landing.data_ptr()
    for first_page, first_place, count in stretches:
        ctypes.memmove(landing_at + first_place * size, pages_at + first_page * size, count * size)


def _listed(write: Write) -> list[Sequence[int]]:
    return [] if write.parts is None else [write.parts]


def check_inside(what: str, indices: Sequence[int], size: int) -> None:
    """Raise `IndexError` for an index outside 0 to size - 1."""
    if indices and not 0 <= min(indices) <= max(indices) < size:
        raise IndexError(f"{what} {min(indices)} to {max(indices)} lies outside 0 to {size - 1}")


def runs(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Longest stretches where both lists count up by one: (first source, first target, length)."""
    start = 0
    for i in range(1, len(source) + 1):
        if i == len(source) or source[i] != source[i - 1] + 1 or target[i] != target[i - 1] + 1:
            yield source[start], target[start], i - start
            start = i
