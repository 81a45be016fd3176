"""One thread that copies pages into mapped peer memory, in order, and can be told to forget a ticket.

Shared by every transport whose peers are reachable by plain loads and stores.
"""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kvrelay.errors import TransportError
from kvrelay.transport.base import Telemetry, TransportEvent, Write, WriteDone, WriteFailed
from kvrelay.types import TicketId, WorkerId
from kvrelay.wakeup import Wakeup

INLINE_BYTES = 128 << 10  # so much is copied in less time than waking a thread takes


class PageWriter:
    """Copies posted writes on its own thread, in order; `peers` holds those that are connected.

    `copy(source pages, the peer's, write)` copies one write and returns its bytes, or raises. Where it is
    `copy_layer`, `peers` holds their pages tensors.

    A small write that nothing is waiting before, and that waits for nothing, `copy_layer` copies at once, on
    its poster's thread.
    """

    def __init__(self, name: str, copy: Callable[[torch.Tensor, Any, Write], int] | None = None) -> None:
        self.peers: dict[WorkerId, Any] = {}
        self._copy_pages = copy or copy_layer
        self.source: torch.Tensor | None = None
        self.wakeup = Wakeup()
        self.telemetry = Telemetry()
        self._queue: deque[Write] = deque()
        self._events: deque[TransportEvent] = deque()
        self._changed = threading.Condition()
        self._active: TicketId | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-writer", daemon=True)
        self._thread.start()

    def submit(self, write: Write) -> None:
        """Queue one write. Raises `TransportError` when the peer is not connected."""
        if write.peer not in self.peers:
            raise TransportError(f"not connected to {write.peer}; connected: {sorted(self.peers)}")
        if len(write.source_blocks) != len(write.target_blocks):
            raise TransportError(f"{len(write.source_blocks)} blocks into {len(write.target_blocks)}")
        with self._changed:
            if self._queue or self._active is not None or not self._is_small(write):
                self._queue.append(write)
                self._changed.notify_all()
                return
        event = self._copy(write)  # only the poster fills the queue and cancels: nothing can come between
        with self._changed:
            self._events.append(event)
        self.wakeup.set()

    def _is_small(self, write: Write) -> bool:
        if self.source is None or write.ready is not None or self._copy_pages is not copy_layer:
            return False
        return len(write.source_blocks) * 2 * self.source[0, 0, 0].nbytes <= INLINE_BYTES

    def cancel(self, ticket_id: TicketId) -> None:
        """Forget the ticket's queued writes and outcomes; wait for the one in progress."""
        with self._changed:
            self._queue = deque(write for write in self._queue if write.ticket_id != ticket_id)
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
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join()
        self.peers.clear()
        self.source = None
        self.wakeup.close()

    def _run(self) -> None:
        while (write := self._next()) is not None:
            event = self._copy(write)
            with self._changed:
                self._active = None
                self._events.append(event)
                self._changed.notify_all()
            self.wakeup.set()

    def _next(self) -> Write | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._queue))
            if self._closed:
                return None
            write = self._queue.popleft()
            self._active = write.ticket_id
            return write

    def _copy(self, write: Write) -> TransportEvent:
        assert self.source is not None, "a store is registered before anything is written"
        try:
            if write.ready is not None:
                write.ready()
            start_s, cpu_s = time.monotonic(), time.thread_time()
            num_bytes = self._copy_pages(self.source, self.peers[write.peer], write)
        except Exception as error:  # noqa: BLE001  whatever it is, the write ends, and the thread goes on
            return WriteFailed(write, f"{type(error).__name__}: {error}")
        end_s = time.monotonic()
        self.telemetry.add("writes")
        self.telemetry.add("bytes_written", num_bytes)
        self.telemetry.add("write_ns", int((end_s - start_s) * 1e9))
        return WriteDone(write, num_bytes, start_s, end_s, time.thread_time() - cpu_s)


def _ticket(event: TransportEvent) -> TicketId | None:
    return event.write.ticket_id if isinstance(event, WriteDone | WriteFailed) else None


def copy_layer(source: torch.Tensor, target: torch.Tensor, write: Write) -> int:
    """Copy the write's blocks between two pages tensors; the number of bytes.

    Raises `IndexError`, before anything is copied, when a layer or block lies outside either.
    """
    check_inside("layer", [write.layer], min(source.shape[0], target.shape[0]))
    check_inside("source block", write.source_blocks, source.shape[2])
    check_inside("target block", write.target_blocks, target.shape[2])
    for half in range(2):  # K, then V
        pages, landing = source[write.layer, half], target[write.layer, half]
        stretches = runs(write.source_blocks, write.target_blocks)
        if source.is_cuda:
            for first_page, first_place, count in stretches:
                landing[first_place : first_place + count].copy_(pages[first_page : first_page + count])
        else:
            _copy_in_memory(pages, landing, stretches)
    return len(write.source_blocks) * 2 * source[0, 0, 0].nbytes


def _copy_in_memory(
    pages: torch.Tensor, landing: torch.Tensor, stretches: Iterator[tuple[int, int, int]]
) -> None:
    """One `memmove` per stretch, the GIL released: a tensor copy of one page costs five times its bytes."""
    size, pages_at, landing_at = pages[0].nbytes, pages.data_ptr(), landing.data_ptr()
    for first_page, first_place, count in stretches:
        ctypes.memmove(landing_at + first_place * size, pages_at + first_page * size, count * size)


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
