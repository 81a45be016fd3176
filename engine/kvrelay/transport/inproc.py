"""Workers that are threads of one process: pages are shared by reference.

For tests, debugging and single-process experiments; the bytes are still copied, as between processes.
"""

from typing import Any

from kvrelay.cache.store import KVStore
from kvrelay.errors import TransportError
from kvrelay.transport.base import (
    Endpoint,
    Notice,
    Notification,
    Site,
    TransportEvent,
    Write,
    check_layout,
)
from kvrelay.transport.writer import PageWriter
from kvrelay.types import TicketId, WorkerId
from kvrelay.wire import Descriptor


class InprocTransport:
    """See `Transport`."""

    def __init__(self, site: Site, options: dict[str, str]) -> None:
        if site.hub is None:
            raise TransportError("inproc joins threads of one process; this worker is a process of its own")
        self._site, self._hub = site, site.hub
        self.writer = PageWriter(site.worker_id, options)
        self._mine: Descriptor | None = None

    def allocate(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def register(self, store: KVStore) -> Descriptor:
        self.writer.source = store.memory
        with self._hub.lock:
            self._hub.endpoints[self._site.worker_id] = Endpoint(store.landed, self.writer.wakeup)
        self._mine = Descriptor(
            transport="inproc",
            worker_id=self._site.worker_id,
            epoch=self._site.epoch,
            layout=store.layout,
            num_blocks=store.num_blocks,
            keeps_stats=store.keeps_stats,
            address={},
        )
        return self._mine

    def connect(self, peer: Descriptor) -> None:
        assert self._mine is not None, "register comes before connect"
        check_layout(self._mine, peer)
        self.writer.peers[peer.worker_id] = self._endpoint(peer.worker_id).memory

    def write(self, write: Write) -> None:
        self.writer.submit(write)

    def withdraw(self, write: Write) -> bool:
        return self.writer.withdraw(write)

    def cancel(self, ticket_id: TicketId) -> None:
        self.writer.cancel(ticket_id)

    def notify(self, peer: WorkerId, message: Notification) -> None:
        endpoint = self._endpoint(peer)
        endpoint.inbox.append(message)
        endpoint.wakeup.set()
        self.writer.telemetry.add("notifications")

    def poll(self) -> list[TransportEvent]:
        events = self.writer.drain()
        inbox = self._endpoint(self._site.worker_id).inbox
        while inbox:
            events.append(Notice(inbox.popleft()))
        return events

    def pollables(self) -> list[Any]:
        return [self.writer.wakeup.fileno()]

    def telemetry(self) -> dict[str, int]:
        return dict(self.writer.telemetry.counters)

    def close(self) -> None:
        with self._hub.lock:
            self._hub.endpoints.pop(self._site.worker_id, None)
        self.writer.close()

    def _endpoint(self, worker_id: WorkerId) -> Endpoint:
        endpoint = self._hub.endpoints.get(worker_id)
        if endpoint is None:
            raise TransportError(f"{worker_id} is not in this process")
        return endpoint
