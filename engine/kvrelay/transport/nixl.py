"""Worker processes whose pages NIXL copies: what its UCX backend finds between them, shared memory to RDMA.

Needs the `nixl` package (extra `nixl`). NIXL tells nobody when something happens, so a thread asks it once a
millisecond. Source: NIXL, `docs/nixl.md` and `src/api/python/_api.py`, ai-dynamo/nixl.
"""

import base64
import binascii
import mmap
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from kvrelay import wire
from kvrelay.cache.store import KVStore
from kvrelay.errors import InvalidConfig, ProtocolError, TransportError
from kvrelay.transport.base import (
    Notice,
    Notification,
    Site,
    TransportEvent,
    Write,
    check_layout,
    no_options,
)
from kvrelay.transport.writer import PageWriter, check_inside, runs
from kvrelay.types import TicketId, WorkerId
from kvrelay.wire import Descriptor

LOOK_EVERY_S = 0.001
WRITE_TIMEOUT_S = 10.0  # also what `cancel` may wait for a peer that is gone
BACKEND = "UCX"


@dataclass(frozen=True, slots=True)
class Peer:
    """A remote agent, and where its landing pages lie."""

    agent: str
    address: int
    shape: tuple[int, int, int]  # layers, halves, blocks


class NixlTransport:
    """See `Transport`."""

    def __init__(self, site: Site, options: dict[str, str]) -> None:
        no_options("nixl", options)
        try:
            api, bindings = import_module("nixl._api"), import_module("nixl._bindings")
        except ImportError as error:
            raise InvalidConfig(f"transport='nixl': {error}; pip install 'kvrelay[nixl]'") from error
        self._errors = tuple(
            v for v in vars(bindings).values() if isinstance(v, type) and issubclass(v, Exception)
        )
        config = api.nixl_agent_config(
            enable_prog_thread=False,
            backends=[BACKEND],
            sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        self._site = site
        self._mine: Descriptor | None = None
        self._agent = api.nixl_agent(f"{site.worker_id}/{site.epoch}/{os.getpid()}/{id(self)}", config)
        self._registered: list[Any] = []
        self._inbox: deque[Notification] = deque()
        self.writer = PageWriter(site.worker_id, self._transfer)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name=f"{site.worker_id}-nixl", daemon=True)
        self._thread.start()

    def allocate(self, num_bytes: int) -> memoryview:
        return memoryview(mmap.mmap(-1, num_bytes))

    def register(self, store: KVStore) -> Descriptor:
        for pages in {id(pages): pages for pages in (store.landing, store.pages)}.values():
            self._registered.append(self._agent.register_memory(pages.flatten(0, -2)))
        self.writer.source = store.pages
        address: dict[str, str | int] = {
            "metadata": base64.b64encode(self._agent.get_agent_metadata()).decode(),
            "pages": store.landing.data_ptr(),
        }
        self._mine = Descriptor(
            transport="nixl",
            worker_id=self._site.worker_id,
            epoch=self._site.epoch,
            layout=store.layout,
            num_blocks=store.num_blocks,
            address=address,
        )
        return self._mine

    def connect(self, peer: Descriptor) -> None:
        assert self._mine is not None, "register comes before connect"
        check_layout(self._mine, peer)
        try:
            metadata = base64.b64decode(str(peer.address["metadata"]), validate=True)
            agent = self._agent.add_remote_agent(metadata)
            agent = agent.decode() if isinstance(agent, bytes) else str(agent)
            self._agent.make_connection(agent)
            pages = int(peer.address["pages"])
        except (KeyError, ValueError, binascii.Error) as error:
            raise TransportError(f"the descriptor of {peer.worker_id} is malformed: {error!r}") from error
        except self._errors as error:
            raise TransportError(f"cannot reach {peer.worker_id}: {error!r}") from error
        shape = (peer.layout.num_layers, 2, peer.num_blocks)
        self.writer.peers[peer.worker_id] = Peer(agent, pages, shape)

    def write(self, write: Write) -> None:
        self.writer.submit(write)

    def cancel(self, ticket_id: TicketId) -> None:
        self.writer.cancel(ticket_id)

    def notify(self, peer: WorkerId, message: Notification) -> None:
        known = self.writer.peers.get(peer)
        if known is None:
            raise TransportError(f"not connected to {peer}; connected: {sorted(self.writer.peers)}")
        try:
            self._agent.send_notif(known.agent, wire.encode(message))
        except self._errors as error:
            raise TransportError(f"{peer} does not read its notifications: {error!r}") from error
        self.writer.telemetry.add("notifications")

    def poll(self) -> list[TransportEvent]:
        events = self.writer.drain()
        while self._inbox:
            events.append(Notice(self._inbox.popleft()))
        return events

    def pollables(self) -> list[Any]:
        return [self.writer.wakeup.fileno()]

    def telemetry(self) -> dict[str, int]:
        return dict(self.writer.telemetry.counters)

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        peers = list(self.writer.peers.values())
        self.writer.close()
        for peer in peers:
            self._agent.remove_remote_agent(peer.agent)
        while self._registered:
            self._agent.deregister_memory(self._registered.pop())
        del self._agent

    def _look(self) -> None:
        """Collect what peers sent, and let NIXL do its part of what they write."""
        while not self._closed.wait(LOOK_EVERY_S):
            for messages in self._agent.get_new_notifs().values():
                for message in messages:
                    try:
                        self._inbox.append(wire.decode(message, "notification"))
                    except ProtocolError:
                        self.writer.telemetry.add("rejected_notifications")
                self.writer.wakeup.set()

    def _transfer(self, source: torch.Tensor, peer: Peer, write: Write) -> int:
        """Copy the write's blocks into the peer's pages, and wait; the number of bytes."""
        check_inside("layer", [write.layer], min(source.shape[0], peer.shape[0]))
        check_inside("source block", write.source_blocks, source.shape[2])
        check_inside("target block", write.target_blocks, peer.shape[2])
        size = source[0, 0, 0].nbytes
        stretches = list(runs(write.source_blocks, write.target_blocks))
        device = (source.get_device(), "VRAM") if source.is_cuda else (0, "DRAM")
        mine, theirs = [], []
        for half in range(2):
            from_at = source[write.layer, half].data_ptr()
            to_at = peer.address + (write.layer * 2 + half) * peer.shape[2] * size
            mine += [(from_at + first * size, count * size, device[0]) for first, _, count in stretches]
            theirs += [(to_at + place * size, count * size, 0) for _, place, count in stretches]
        descriptors = [self._agent.get_xfer_descs(*each) for each in ((mine, device[1]), (theirs, "DRAM"))]
        self._wait(self._agent.initialize_xfer("WRITE", *descriptors, peer.agent))
        return len(write.source_blocks) * 2 * size

    def _wait(self, transfer: Any) -> None:
        try:
            state, deadline_s = self._agent.transfer(transfer), time.monotonic() + WRITE_TIMEOUT_S
            while state == "PROC" and time.monotonic() < deadline_s:
                time.sleep(0)
                state = self._agent.check_xfer_state(transfer)
        finally:
            self._agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise TransportError(f"NIXL ended the write in state {state}")
