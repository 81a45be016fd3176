"""GB/s and latency of every transport, beside memcpy and TCP in the same run.

    python benchmarks/transport.py [--rounds 5] [--pages 200] [--large-mib 64]

The receiver (`transport_receiver.py`) is a process of its own, or a thread for transports that join threads.
It owns the memory the bytes land in, stamps the moment it knows that a message is whole, and afterwards
answers with a checksum of what it holds, which the gate compares with the sender's. Messages: one page of one
layer (K and V of 64 tokens), whose latency counts; and many pages, in order and in shuffled order.

memcpy is one thread's `memmove` between two buffers; TCP is a loopback connection. All take turns within each
round. The first large message is reported apart: it touches its pages for the first time. Medians over the
rounds, and shares of memcpy; the last line is the JSON record, also under benchmarks/results/.
"""

import argparse
import ctypes
import json
import multiprocessing
import random
import socket
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.transport import TRANSPORTS, is_in_process
from kvrelay.transport.base import InprocHub, Write, WriteDone
from kvrelay.types import TicketId
from kvrelay.wire import Filled
from transport_receiver import (
    LAYOUT,
    RECEIVER,
    SENDER,
    TIMEOUT_S,
    open_side,
    receive_pages,
    receive_stream,
    wait_for,
)


class Channel(Protocol):
    """A way for bytes to another owner."""

    def fill(self, seed: int) -> None:
        """New bytes to send."""

    def send(self, source: Sequence[int], target: Sequence[int]) -> float:
        """Copy pages `source` to places `target`; seconds until the receiver knows that all have arrived."""

    def is_whole(self) -> bool:
        """Whether the receiver's checksum is that of what was sent."""


class Memcpy:
    """The ceiling: one thread's `memmove`, page by page where the order is shuffled."""

    def __init__(self, num_bytes: int) -> None:
        self.source, self.target = bytearray(num_bytes), bytearray(num_bytes)
        self._from = ctypes.addressof(ctypes.c_char.from_buffer(self.source))
        self._to = ctypes.addressof(ctypes.c_char.from_buffer(self.target))

    def fill(self, seed: int) -> None:
        self.source[:] = random.Random(seed).randbytes(len(self.source))

    def send(self, source: Sequence[int], target: Sequence[int]) -> float:
        size = LAYOUT.block_bytes
        in_order = list(source) == list(target) == list(range(len(source)))
        start_s = time.monotonic()
        if in_order:
            ctypes.memmove(self._to, self._from, len(source) * size)
        else:
            for a, b in zip(source, target, strict=True):
                ctypes.memmove(self._to + b * size, self._from + a * size, size)
        return time.monotonic() - start_s

    def is_whole(self) -> bool:
        return True  # a copy within one process has no other owner to ask


class Pages:
    """A transport of the table."""

    def __init__(self, spec: str, num_blocks: int, stack: ExitStack) -> None:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        hub = InprocHub()
        self._transport, self._store = open_side(spec, SENDER, directory, num_blocks, hub)
        stack.callback(self._transport.close)
        self._transport.register(self._store)
        is_thread = is_in_process(spec)
        arguments = (spec, directory, num_blocks, hub if is_thread else None)
        self._receiver = stack.enter_context(_beside(receive_pages, arguments, is_thread))
        self._transport.connect(_hear(self._receiver))
        self._expected = torch.zeros_like(self._store.pages)

    def fill(self, seed: int) -> None:
        data = self._store.pages.view(torch.uint8)
        generator = torch.Generator().manual_seed(seed)
        data.copy_(torch.randint(256, data.shape, generator=generator, dtype=torch.uint8))

    def send(self, source: Sequence[int], target: Sequence[int]) -> float:
        ticket = TicketId("t")
        write = Write(ticket_id=ticket, peer=RECEIVER, layer=0, source_blocks=source, target_blocks=target)
        start_s = time.monotonic()
        self._transport.write(write)
        done = wait_for(self._transport, WriteDone)
        assert done is not None
        filled = Filled(ticket_id=ticket, layout_fingerprint="", num_tokens=0, num_bytes=done.num_bytes)
        self._transport.notify(RECEIVER, filled)
        elapsed_s: float = _hear(self._receiver) - start_s
        self._expected[:, :, list(target)] = self._store.pages[:, :, list(source)]
        return elapsed_s

    def is_whole(self) -> bool:
        self._receiver.send("checksum")
        return bool(_hear(self._receiver) == zlib.crc32(self._expected.view(torch.uint8).numpy().data))


class Stream:
    """TCP over loopback: pages leave one after the other, in the order of their places."""

    def __init__(self, num_bytes: int, stack: ExitStack) -> None:
        self._receiver = stack.enter_context(_beside(receive_stream, (num_bytes,), False))
        address = ("127.0.0.1", _hear(self._receiver))
        self._stream = stack.enter_context(socket.create_connection(address))
        self._data = bytearray(num_bytes)
        self._expected = bytearray(num_bytes)

    def fill(self, seed: int) -> None:
        self._data[:] = random.Random(seed).randbytes(len(self._data))

    def send(self, source: Sequence[int], target: Sequence[int]) -> float:
        length = len(source) * LAYOUT.block_bytes
        payload = memoryview(self._data)[:length]
        start_s = time.monotonic()
        self._stream.sendall(length.to_bytes(8, "little"))
        self._stream.sendall(payload)
        elapsed_s: float = _hear(self._receiver) - start_s
        self._expected[:length] = payload
        return elapsed_s

    def is_whole(self) -> bool:
        self._receiver.send("checksum")
        return bool(_hear(self._receiver) == zlib.crc32(self._expected))


def _hear(receiver: Connection) -> Any:
    assert receiver.poll(TIMEOUT_S), f"the receiver said nothing for {TIMEOUT_S:g} s"
    return receiver.recv()


@contextmanager
def _beside(function: Any, arguments: tuple[Any, ...], is_thread: bool) -> Iterator[Connection]:
    """`function(*arguments, connection)` in a process of its own, or a thread; yields our end."""
    ours, theirs = multiprocessing.Pipe()
    start = threading.Thread if is_thread else multiprocessing.get_context("spawn").Process
    worker = start(target=function, args=(*arguments, theirs), daemon=True)
    worker.start()
    try:
        yield ours
    finally:
        ours.send("stop")
        worker.join(TIMEOUT_S)


def main() -> None:
    """Measure, print, record."""
    options = _options()
    num_blocks = options.large_mib * 2**20 // LAYOUT.block_bytes
    num_bytes = num_blocks * LAYOUT.block_bytes
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)  # as in a worker that has one core
    with ExitStack() as stack:
        channels: dict[str, Channel] = {"memcpy": Memcpy(num_bytes), "TCP": Stream(num_bytes, stack)}
        for name in TRANSPORTS:
            if name != "faulty" and (name != "nixl" or find_spec("nixl")):  # the one carries nothing itself
                channels[name] = Pages(name, num_blocks, stack)
        for index in range(-1, options.rounds):  # round -1 touches every page for the first time
            for name in list(channels)[:: -1 if index % 2 else 1]:
                rows += _round(name, channels[name], index, num_blocks, options.pages)
    results = _summary([row for row in rows if row["round"] >= 0], rows, num_bytes)
    gate = Gate(
        checks={"the receiver held exactly what was sent, after every pattern": all(r["whole"] for r in rows)}
    )
    _show(results)
    print(f"gate: {gate.checks}")
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    record = make_record("transport", settings, gate, {"medians": results, "rounds": rows})
    write_record(record, options.out / "transport.json")
    print(json.dumps(record))


def _round(name: str, channel: Channel, index: int, num_blocks: int, num_pages: int) -> list[dict[str, Any]]:
    """Each pattern once: its seconds (of a page: the median), and whether the bytes were right."""
    order = list(range(num_blocks))
    shuffled = random.Random(index).sample(order, num_blocks)
    rows = []
    for number, pattern in enumerate(("large", "shuffled", "page")):
        channel.fill(seed=3 * (index + 1) + number)
        if pattern == "page":
            times = sorted(channel.send([i % num_blocks], [i % num_blocks]) for i in range(num_pages))
            figures = {"seconds": times[len(times) // 2], "p99_s": times[int(0.99 * len(times))]}
        else:
            figures = {"seconds": channel.send(order, order if pattern == "large" else shuffled)}
        rows.append(
            {"channel": name, "round": index, "pattern": pattern, "whole": channel.is_whole(), **figures}
        )
    return rows


def _summary(
    warm: list[dict[str, Any]], rows: list[dict[str, Any]], num_bytes: int
) -> dict[str, dict[str, float]]:
    def median(name: str, pattern: str, key: str = "seconds") -> float:
        return statistics.median(
            row[key] for row in warm if (row["channel"], row["pattern"]) == (name, pattern)
        )

    results = {}
    for name in dict.fromkeys(row["channel"] for row in rows):
        first = next(row["seconds"] for row in rows if (row["channel"], row["pattern"]) == (name, "large"))
        results[name] = {
            "large_gb_per_s": num_bytes / median(name, "large") / 1e9,
            "shuffled_gb_per_s": num_bytes / median(name, "shuffled") / 1e9,
            "first_touch_gb_per_s": num_bytes / first / 1e9,
            "page_us": 1e6 * median(name, "page"),
            "page_p99_us": 1e6 * median(name, "page", "p99_s"),
            "large_over_memcpy": median("memcpy", "large") / median(name, "large"),
            "shuffled_over_memcpy": median("memcpy", "shuffled") / median(name, "shuffled"),
        }
    return results


def _show(results: dict[str, dict[str, float]]) -> None:
    for name, row in sorted(results.items(), key=lambda item: -item[1]["large_over_memcpy"]):
        print(f"{name:10} " + "  ".join(f"{key} {value:.3g}" for key, value in row.items()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pages", type=int, default=200, help="single pages per round")
    parser.add_argument("--large-mib", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
