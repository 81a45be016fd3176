"""The receiving end of `transport.py`: owns the memory, stamps arrivals, checksums what it holds.

Each function serves one connection to the sender: it first sends its address, then the time at which it knew
of each message, and answers "checksum" with the CRC-32 of its memory, until "stop".
"""

import socket
import time
import zlib
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
import zmq

from kvrelay.cache.store import KVStore
from kvrelay.transport import open_transport
from kvrelay.transport.base import InprocHub, Notice, Site, Transport
from kvrelay.types import KVLayout, WorkerId

SENDER, RECEIVER = WorkerId("sender"), WorkerId("receiver")
LAYOUT = KVLayout(model="m", dtype="bfloat16", num_layers=1, num_kv_heads=3, head_dim=64)  # one of SmolLM2's
TIMEOUT_S = 30.0
Event = TypeVar("Event")


def wait_for(transport: Transport, kind: type[Event], also: Any = None) -> Event | None:
    """The next event of that kind, waiting as a worker does; None when `also` became readable before.

    Raises `AssertionError` on any other event, or when nothing comes.
    """
    poller = zmq.Poller()
    for source in (*transport.pollables(), *([also] if also is not None else [])):
        poller.register(source, zmq.POLLIN)
    while True:
        for event in transport.poll():
            assert isinstance(event, kind), event
            return event
        ready = dict(poller.poll(TIMEOUT_S * 1e3))
        assert ready or also is not None, f"no {kind.__name__} within {TIMEOUT_S:g} s"
        if also is not None and also.fileno() in ready:
            return None


def open_side(
    spec: str, worker_id: WorkerId, directory: str, num_blocks: int, hub: InprocHub | None
) -> tuple[Transport, KVStore]:
    """One end of a transport with its pages; `register` is left to the caller."""
    site = Site(worker_id=worker_id, epoch=1, run_directory=directory, hub=hub)
    transport = open_transport(spec, site)
    buffer = transport.allocate(num_blocks * LAYOUT.block_bytes)
    return transport, KVStore(LAYOUT, num_blocks, buffer, torch.device("cpu"))


def receive_pages(
    spec: str, directory: str, num_blocks: int, hub: InprocHub | None, sender: Connection
) -> None:
    """Serve one transport: every notification is a message that is whole."""
    transport, store = open_side(spec, RECEIVER, directory, num_blocks, hub)
    sender.send(transport.register(store))
    try:
        while True:
            notice = wait_for(transport, Notice, sender)
            if notice is not None:
                sender.send(time.monotonic())
            elif sender.recv() == "stop":
                return
            else:
                sender.send(zlib.crc32(store.landing.view(torch.uint8).numpy().data))
    finally:
        transport.close()


def receive_stream(num_bytes: int, sender: Connection) -> None:
    """Serve one TCP connection: a message is its length in eight bytes, then the bytes."""
    memory = memoryview(bytearray(num_bytes))
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender.send(server.getsockname()[1])
        stream, _ = server.accept()
    with stream:
        while True:
            if sender in wait([stream, sender]):
                if sender.recv() == "stop":
                    return
                sender.send(zlib.crc32(memory))
            elif header := stream.recv(8, socket.MSG_WAITALL):
                read, length = 0, int.from_bytes(header, "little")
                while read < length:
                    read += stream.recv_into(memory[read:length])
                sender.send(time.monotonic())
