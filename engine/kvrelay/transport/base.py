"""What a transport is: the protocol, its events, and where it lives.

Shaped like NIXL's agent (register memory, connect to a peer's descriptor, post writes by block index, poll,
notify), so that NIXL is one adapter among others. Source: NIXL, `docs/nixl.md`, ai-dynamo/nixl.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvrelay.cache.memory import KVMemory
from kvrelay.cache.store import KVStore
from kvrelay.types import TicketId, WorkerId
from kvrelay.wire import Descriptor, Notification


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Copy K and V of one layer, block by block, into the peer's pages.

    `source_blocks[i]` goes to `target_blocks[i]`: part `parts[i]` of it alone where parts are given, all of
    them tiles of K and V or all of them statistics (see `KVMemory`). Urgent writes go before others.
    `ready()` blocks until the source bytes are computed (a device event); None when they already are.
    """

    ticket_id: TicketId
    peer: WorkerId
    layer: int
    source_blocks: Sequence[int]
    target_blocks: Sequence[int]
    ready: Callable[[], None] | None = None
    parts: Sequence[int] | None = None
    is_urgent: bool = False


@dataclass(frozen=True, slots=True)
class WriteDone:
    """The write is complete: its bytes are in the peer's memory."""

    write: Write
    num_bytes: int
    start_s: float
    end_s: float
    cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WriteFailed:
    """The write did not happen, or not whole."""

    write: Write
    reason: str


@dataclass(frozen=True, slots=True)
class Notice:
    """A peer's notification arrived."""

    message: Notification


TransportEvent = WriteDone | WriteFailed | Notice


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One thread's end of an in-process engine: the memory it lands KV in, and how it is told something."""

    memory: KVMemory
    report: Callable[[Notice], None]


class InprocHub:
    """Where the threads of one engine find each other; one per engine."""

    def __init__(self) -> None:
        self.endpoints: dict[WorkerId, Endpoint] = {}
        self.lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Who opens the transport, and where its files may lie. `hub` joins threads of one process."""

    worker_id: WorkerId
    epoch: int
    run_directory: str
    hub: InprocHub | None = None


class Transport(Protocol):
    """One worker's end of the data plane. Only `poll` reports; nothing else blocks but `cancel`, briefly."""

    def allocate(self, num_bytes: int) -> memoryview:
        """Zeroed host memory that peers will be able to write into."""

    def register(self, store: KVStore) -> Descriptor:
        """Open the store's landing pages to peers; the descriptor is what they pass to `connect`."""

    def connect(self, peer: Descriptor) -> None:
        """Map the peer's pages. Raises `LayoutMismatch` when layouts differ, `TransportError` otherwise."""

    def write(self, write: Write) -> None:
        """Post one write. It ends as one `WriteDone` or `WriteFailed`, unless withdrawn or cancelled."""

    def withdraw(self, write: Write) -> bool:
        """Take back a posted write (this very object) that has not begun; False when it is too late."""

    def cancel(self, ticket_id: TicketId) -> None:
        """After this returns, no write of the ticket touches the peer's memory or will be reported."""

    def notify(self, peer: WorkerId, message: Notification) -> None:
        """Tell the peer something about a ticket. Ordered only against other notifications to the peer."""

    def poll(self) -> list[TransportEvent]:
        """What happened since the last call; never blocks."""

    def pollables(self) -> list[Any]:
        """Sockets or file descriptors that become readable when `poll` has something."""

    def telemetry(self) -> dict[str, int]:
        """Counters: `bytes_written`, `writes`, `write_ns`, `notifications`, and the transport's own."""

    def close(self) -> None:
        """Stop writing, unmap peers, leave nothing behind. Safe to call twice."""
