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
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from kvrelay import codec
from kvrelay.cache.memory import NUM_VECTORS, KVMemory
from kvrelay.cache.store import KVStore
from kvrelay.errors import InvalidConfig, TransportError
from kvrelay.transport.base import Site, Write
from kvrelay.transport.copying import check_inside, runs
from kvrelay.transport.writer import PageWriter
from kvrelay.types import BLOCK_SIZE, KVLayout, WorkerId
from kvrelay.wire import Descriptor, Notification

LOOK_EVERY_S = 0.001
WRITE_TIMEOUT_S = 10.0  # also what `cancel` may wait for a peer that is gone
BACKEND = "UCX"
PIECES = ("pages", "vectors", "spreads")  # of a worker's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the parts of one worker's memory lie: addresses of its pages, vectors and spreads."""

    addresses: tuple[int, int, int]
    layout: KVLayout
    num_blocks: int
    keeps_stats: bool

    def page(self, layer: int, half: int, block: int) -> int:
        """Address of K (or V) of a block; the next block's follows it."""
        pages, _, _ = self.addresses
        return pages + ((layer * 2 + half) * self.num_blocks + block) * self.layout.page_bytes

    def part(self, layer: int, part: int, block: int) -> list[tuple[int, int]]:
        """Address and size of each piece of a part (see `KVMemory`)."""
        heads = self.layout.num_kv_heads
        tile_bytes = self.layout.page_bytes // heads
        if part < self.layout.statistics:
            half, head = divmod(part, heads)
            return [(self.page(layer, half, block) + head * tile_bytes, tile_bytes)]
        _, vectors, spreads = self.addresses
        size = self.layout.page_bytes // BLOCK_SIZE  # a vector of every head
        rows = range(layer * NUM_VECTORS, (layer + 1) * NUM_VECTORS)
        found = [(vectors + (row * self.num_blocks + block) * size, size) for row in rows]
        spread = size // self.layout.head_dim  # a number of every head
        return [*found, (spreads + (layer * self.num_blocks + block) * spread, spread)]


@dataclass(frozen=True, slots=True)
class Peer:
    """A remote agent, and where its landing memory lies."""

    agent: str
    places: Places


class NixlTransport:
    """See `Transport`."""

    def __init__(self, site: Site, options: dict[str, str]) -> None:
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
        self._agent = api.nixl_agent(f"{site.worker_id}/{site.epoch}/{os.getpid()}/{id(self)}", config)
        self._registered: list[Any] = []
        self.writer = writer = PageWriter(site, options, self._transfer)
        self.write, self.withdraw, self.cancel = writer.write, writer.withdraw, writer.cancel
        self.poll, self.telemetry = writer.poll, writer.telemetry
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name=f"{site.worker_id}-nixl", daemon=True)
        self._thread.start()

    def allocate(self, num_bytes: int) -> memoryview:
        return memoryview(mmap.mmap(-1, num_bytes))

    def register(self, store: KVStore) -> Descriptor:
        for memory in {id(memory): memory for memory in (store.landed, store.memory)}.values():
            for tensor in filter(torch.numel, memory.tensors):
                self._registered.append(self._agent.register_memory(tensor.flatten(0, -2)))
        address: dict[str, str | int] = {
            "metadata": base64.b64encode(self._agent.get_agent_metadata()).decode(),
        }
        address |= zip(PIECES, (tensor.data_ptr() for tensor in store.landed.tensors), strict=True)
        return self.writer.register(store, address)

    def connect(self, peer: Descriptor) -> None:
        self.writer.check_layout(peer)
        try:
            metadata = base64.b64decode(str(peer.address["metadata"]), validate=True)
            agent = self._agent.add_remote_agent(metadata)
            agent = agent.decode() if isinstance(agent, bytes) else str(agent)
            self._agent.make_connection(agent)
            pages, vectors, spreads = (int(peer.address[piece]) for piece in PIECES)
        except (KeyError, ValueError, binascii.Error) as error:
            raise TransportError(f"the descriptor of {peer.worker_id} is malformed: {error!r}") from error
        except self._errors as error:
            raise TransportError(f"cannot reach {peer.worker_id}: {error!r}") from error
        places = Places(
            addresses=(pages, vectors, spreads),
            layout=peer.layout,
            num_blocks=peer.num_blocks,
            keeps_stats=peer.keeps_stats,
        )
        self.writer.peers[peer.worker_id] = Peer(agent, places)

    def notify(self, peer: WorkerId, message: Notification) -> None:
        known = self.writer.peers.get(peer)
        if known is None:
            raise TransportError(f"not connected to {peer}; connected: {sorted(self.writer.peers)}")
        try:
            self._agent.send_notif(known.agent, codec.encode(message))
        except self._errors as error:
            raise TransportError(f"{peer} does not read its notifications: {error!r}") from error
        self.writer.counters["notifications"] += 1

    def pollables(self) -> list[Any]:
        return [self.writer.wakeup.fileno()]

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
                    self.writer.hear(message)

    def _transfer(self, source: KVMemory, peer: Peer, write: Write) -> int:
        """Copy the write's blocks, or parts of them, into the peer's memory, and wait; the bytes."""
        theirs, layer = peer.places, write.layer
        mine = Places(
            addresses=source.addresses,
            layout=theirs.layout,
            num_blocks=source.pages.shape[2],
            keeps_stats=len(source.vectors) > 0,
        )
        check_inside("layer", [layer], theirs.layout.num_layers)
        check_inside("source block", write.source_blocks, mine.num_blocks)
        check_inside("target block", write.target_blocks, theirs.num_blocks)
        has_stats = mine.keeps_stats and theirs.keeps_stats
        check_inside("part", write.parts or (), theirs.layout.statistics + has_stats)
        moves = _moves(mine, theirs, write)
        device = (source.pages.get_device(), "VRAM") if source.pages.is_cuda else (0, "DRAM")
        descriptors = [
            self._agent.get_xfer_descs([(at, size, device[0]) for at, _, size in moves], device[1]),
            self._agent.get_xfer_descs([(place, size, 0) for _, place, size in moves], "DRAM"),
        ]
        self._wait(self._agent.initialize_xfer("WRITE", *descriptors, peer.agent))
        return sum(size for _, _, size in moves)

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


def _moves(mine: Places, theirs: Places, write: Write) -> list[tuple[int, int, int]]:
    """Source address, target address and size of each piece that a write copies."""
    layer, blocks = write.layer, zip(write.source_blocks, write.target_blocks, strict=True)
    if write.parts is not None:
        return [
            (at, place, size)
            for part, (source, target) in zip(write.parts, blocks, strict=True)
            for (at, size), (place, _) in zip(
                mine.part(layer, part, source), theirs.part(layer, part, target), strict=True
            )
        ]
    size = mine.layout.page_bytes
    return [
        (mine.page(layer, half, first), theirs.page(layer, half, place), count * size)
        for half in range(2)
        for first, place, count in runs(write.source_blocks, write.target_blocks)
    ]
