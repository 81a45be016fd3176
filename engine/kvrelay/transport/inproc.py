"""Workers that are threads of one process: pages are shared by reference.

For tests, debugging and single-process experiments; the bytes are still copied, as between processes.
"""

from typing import Any

from kvrelay.cache.store import KVStore
from kvrelay.errors import TransportError
from kvrelay.transport.base import Endpoint, Notice, Site
from kvrelay.transport.writer import PageWriter
from kvrelay.types import WorkerId
from kvrelay.wire import Descriptor, Notification


class InprocTransport:
    """See `Transport`."""

    def __init__(self, site: Site, options: dict[str, str]) -> None:
        if site.hub is None:
            raise TransportError("inproc joins threads of one process; this worker is a process of its own")
        self._site, self._hub = site, site.hub
        self.writer = writer = PageWriter(site, options)
        self.write, self.withdraw, self.cancel = writer.write, writer.withdraw, writer.cancel
        self.poll, self.telemetry = writer.poll, writer.telemetry

    def allocate(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def register(self, store: KVStore) -> Descriptor:
        with self._hub.lock:
            self._hub.endpoints[self._site.worker_id] = Endpoint(store.landed, self.writer.report)
        return self.writer.register(store, {})

    def connect(self, peer: Descriptor) -> None:
        self.writer.check_layout(peer)
        self.writer.peers[peer.worker_id] = self._endpoint(peer.worker_id).memory

    def notify(self, peer: WorkerId, message: Notification) -> None:
        self._endpoint(peer).report(Notice(message))
        self.writer.counters["notifications"] += 1

    def pollables(self) -> list[Any]:
        return [self.writer.wakeup.fileno()]

    def close(self) -> None:
        with self._hub.lock:
            self._hub.endpoints.pop(self._site.worker_id, None)
        self.writer.close()

    def _endpoint(self, worker_id: WorkerId) -> Endpoint:
        endpoint = self._hub.endpoints.get(worker_id)
        if endpoint is None:
            raise TransportError(f"{worker_id} is not in this process")
        return endpoint
