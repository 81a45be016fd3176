"""One suite for every transport in the table; then what the faulty one does on demand."""

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq

from kvrelay.cache.memory import memory_bytes
from kvrelay.cache.store import KVStore
from kvrelay.errors import InvalidConfig, LayoutMismatch, TransportError, UnknownName
from kvrelay.transport import TRANSPORTS, open_transport, parse_transport
from kvrelay.transport.base import (
    InprocHub,
    Notice,
    Site,
    Transport,
    TransportEvent,
    Write,
    WriteDone,
    WriteFailed,
)
from kvrelay.types import KVLayout, TicketId, WorkerId
from kvrelay.wire import Descriptor, Filled, Filling

NUM_BLOCKS = 6
NUM_LAYERS = 3
without_nixl = pytest.mark.skipif(find_spec("nixl") is None, reason="nixl is not installed (extra nixl)")
SPECS = [
    *(name for name in TRANSPORTS if name not in ("faulty", "nixl")),
    pytest.param("nixl", marks=without_nixl),
    *("faulty:inner=inproc", "faulty:inner=shm"),
    *("shm:gbit_per_s=2", "inproc:gbit_per_s=2", "faulty:inner=shm:gbit_per_s=2"),
]
DECODE = WorkerId("decode-0")
TICKET = TicketId("decode-0/1/1")


def layout(**changes: object) -> KVLayout:
    base = KVLayout(model="m", dtype="float32", num_layers=NUM_LAYERS, num_kv_heads=2, head_dim=4)
    return msgspec.structs.replace(base, **changes)


class Side:
    """One worker's transport and pages, filled with its own byte."""

    def __init__(self, transport: Transport, kv: KVLayout, byte: int) -> None:
        self.transport = transport
        buffer = transport.allocate(memory_bytes(kv, NUM_BLOCKS, keeps_stats=True))
        assert not any(buffer[:64]), "memory starts zeroed"
        self.store = KVStore(kv, NUM_BLOCKS, buffer, torch.device("cpu"), keeps_stats=True)
        for tensor in self.store.memory.tensors:
            tensor.view(torch.uint8).fill_(byte)
        self.descriptor = transport.register(self.store)

    def poll_until(
        self, done: Callable[[list[TransportEvent]], bool], timeout_s: float = 5.0
    ) -> list[TransportEvent]:
        events: list[TransportEvent] = []
        deadline_s = time.monotonic() + timeout_s
        while not done(events):
            assert time.monotonic() < deadline_s, f"only {events}"
            events += self.transport.poll()
            time.sleep(0.001)
        return events

    def outcomes(self, count: int) -> list[TransportEvent]:
        return self.poll_until(lambda events: len(events) >= count)


Opener = Callable[..., Side]


@pytest.fixture
def opener() -> Iterator[Opener]:
    """Opens sides of one engine: a common hub and run directory; closes them all."""
    hub, sides, before = InprocHub(), list[Side](), set(threading.enumerate())
    with tempfile.TemporaryDirectory() as directory:

        def start(spec: str, worker_id: str, kv: KVLayout | None = None, byte: int = 0) -> Side:
            site = Site(worker_id=WorkerId(worker_id), epoch=1, run_directory=directory, hub=hub)
            side = Side(open_transport(spec, site), kv or layout(), byte)
            sides.append(side)
            return side

        yield start
        for side in sides:
            side.transport.close()
        assert not set(threading.enumerate()) - before, "threads left behind"


@pytest.fixture(params=SPECS)
def pair(request: pytest.FixtureRequest, opener: Opener) -> tuple[Side, Side]:
    """A prefill side connected to a decode side, and the other way round for notifications."""
    return connected(opener, request.param)


def connected(opener: Opener, spec: str) -> tuple[Side, Side]:
    prefill, decode = opener(spec, "prefill-0", byte=7), opener(spec, "decode-0", byte=1)
    shape = prefill.store.pages.shape
    prefill.store.pages.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    prefill.store.memory.vectors.normal_()
    prefill.store.memory.spreads.normal_()
    prefill.transport.connect(decode.descriptor)
    return prefill, decode


def write(
    layer: int,
    source: list[int],
    target: list[int],
    ticket: str = TICKET,
    ready: Callable[[], None] | None = None,
    **fields: Any,
) -> Write:
    return Write(
        ticket_id=TicketId(ticket),
        peer=DECODE,
        layer=layer,
        source_blocks=source,
        target_blocks=target,
        ready=ready,
        **fields,
    )


# Every transport ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ([0], [5]),
        ([0, 1, 2], [3, 4, 5]),
        ([0, 1, 2], [4, 1, 3]),
        ([5, 0, 3], [1, 4, 2]),
        ([0, 1, 3], [2, 3, 4]),
        ([2], [2]),
    ],
)
def test_bytes_arrive_where_the_indices_say_and_nowhere_else(
    pair: tuple[Side, Side], source: list[int], target: list[int]
) -> None:
    prefill, decode = pair
    expected = decode.store.pages.clone()
    expected[:, :, target] = prefill.store.pages[:, :, source]
    before = prefill.store.pages.clone()
    posted = [write(layer, source, target) for layer in range(NUM_LAYERS)]
    for item in posted:
        prefill.transport.write(item)
    events = prefill.outcomes(NUM_LAYERS)
    assert [event.write for event in events if isinstance(event, WriteDone)] == posted, "in order, one each"
    assert torch.equal(decode.store.pages.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(prefill.store.pages, before)
    assert prefill.store.digests(source) == decode.store.digests(target, landed=True)
    block_bytes = len(source) * layout().block_bytes
    assert sum(event.num_bytes for event in events if isinstance(event, WriteDone)) == block_bytes
    assert all(event.start_s <= event.end_s for event in events if isinstance(event, WriteDone))


def test_one_layer_leaves_the_others_alone(pair: tuple[Side, Side]) -> None:
    prefill, decode = pair
    before = decode.store.pages.clone()
    prefill.transport.write(write(1, [0], [0]))
    prefill.outcomes(1)
    assert torch.equal(decode.store.pages[[0, 2]].view(torch.uint8), before[[0, 2]].view(torch.uint8))
    assert torch.equal(decode.store.pages[1, :, 0], prefill.store.pages[1, :, 0])


@pytest.mark.parametrize("parts", [[0, 1, 2], [3, 0, 1], [2, 2, 2], [4, 4, 4]])
def test_parts_of_blocks_arrive_and_nothing_else(pair: tuple[Side, Side], parts: list[int]) -> None:
    """K of heads 0 and 1, V of heads 0 and 1, statistics: parts 0 to 4."""
    prefill, decode = pair
    source, target = [0, 3, 5], [4, 1, 1 if parts[0] == 3 else 2]
    mine, theirs = decode.store.memory, prefill.store.memory
    expected = [tensor.clone() for tensor in mine.tensors]
    for part, first, second in zip(parts, source, target, strict=True):
        if part == 4:
            expected[1][1, :, second] = theirs.vectors[1, :, first]
            expected[2][1, second] = theirs.spreads[1, first]
        else:
            expected[0][1, part // 2, second, part % 2] = theirs.pages[1, part // 2, first, part % 2]
    posted = write(1, source, target, parts=parts)
    prefill.transport.write(posted)
    (event,) = prefill.outcomes(1)
    assert isinstance(event, WriteDone), event
    assert event.write is posted
    for tensor, wanted in zip(mine.tensors, expected, strict=True):
        assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8))
    assert event.num_bytes == (3 * 64 * 4 * 4 if parts != [4, 4, 4] else 3 * 2 * (5 * 4 + 1) * 4)
    assert theirs.digest(1, parts, source) == mine.digest(1, parts, target)
    assert theirs.digest(1, parts, source) != mine.digest(2, parts, target)


@pytest.mark.parametrize("parts", [[5], [-1], [99]])
def test_a_part_that_there_is_not_is_a_failed_write(pair: tuple[Side, Side], parts: list[int]) -> None:
    prefill, decode = pair
    before = decode.store.pages.clone()
    prefill.transport.write(write(0, [0], [0], parts=parts))
    (event,) = prefill.outcomes(1)
    assert isinstance(event, WriteFailed), event
    assert "part" in event.reason
    assert torch.equal(decode.store.pages.view(torch.uint8), before.view(torch.uint8))
    with pytest.raises(TransportError, match="parts"):
        prefill.transport.write(write(0, [0, 1], [0, 1], parts=[0]))


def test_urgent_writes_overtake_and_a_withdrawn_one_never_happens(pair: tuple[Side, Side]) -> None:
    prefill, decode = pair
    before = decode.store.pages[2, :, 2].clone()
    gate = threading.Event()
    first = write(0, [0], [0], ready=lambda: gate.wait(5) and None)
    prefill.transport.write(first)
    time.sleep(0.02)
    plain, gone = write(1, [1], [1]), write(2, [2], [2])
    urgent = [write(layer, [3], [3], is_urgent=True) for layer in range(2)]
    for item in (plain, gone, *urgent):
        prefill.transport.write(item)
    assert prefill.transport.withdraw(gone)
    assert not prefill.transport.withdraw(gone), "it is gone already"
    assert not prefill.transport.withdraw(first), "it has begun"
    assert not prefill.transport.withdraw(write(1, [1], [1])), (
        "this one was never posted, though it looks alike"
    )
    gate.set()
    events = prefill.outcomes(4)
    time.sleep(0.02)
    assert prefill.transport.poll() == []
    assert [event.write for event in events if isinstance(event, WriteDone)] == [first, *urgent, plain]
    assert torch.equal(decode.store.pages[2, :, 2].view(torch.uint8), before.view(torch.uint8))
    assert not prefill.transport.withdraw(plain), "it is done"


@pytest.mark.parametrize("spec", ["shm:gbit_per_s=0.004", "inproc:gbit_per_s=0.004"])
def test_a_paced_link_takes_its_time_and_no_more(opener: Opener, spec: str) -> None:
    """0.5 MB/s: a block's layer of 4 KiB takes 8.2 ms, whoever waits, and a cancelled one none."""
    prefill, decode = connected(opener, spec)
    block_s = 2 * layout().page_bytes / 0.5e6
    start_s = time.monotonic()
    for layer in range(NUM_LAYERS):
        prefill.transport.write(write(layer, [0, 1], [0, 1]))
    assert time.monotonic() - start_s < block_s, "posting does not wait"
    events = prefill.outcomes(NUM_LAYERS)
    took_s = time.monotonic() - start_s
    assert 6 * block_s <= took_s < 6 * block_s + 0.5
    done = [event for event in events if isinstance(event, WriteDone)]
    assert all(event.end_s - event.start_s >= 2 * block_s for event in done)
    assert decode.store.digests([0, 1], landed=True) == prefill.store.digests([0, 1])
    everything = list(range(NUM_BLOCKS)) * 100
    prefill.transport.write(write(0, everything, everything, "gone"))  # five seconds
    time.sleep(0.02)
    start_s = time.monotonic()
    prefill.transport.cancel(TicketId("gone"))
    prefill.transport.write(write(0, [2], [2]))
    assert isinstance(prefill.outcomes(1)[0], WriteDone)
    assert time.monotonic() - start_s < 0.5
    prefill.transport.write(write(0, everything, everything, "late"))
    start_s = time.monotonic()
    prefill.transport.close()
    assert time.monotonic() - start_s < 0.5, "closing does not wait for the link"


@pytest.mark.parametrize("pace", ["0", "-1", "nan", "fast", "1e9", "inf"])
def test_an_impossible_pace_is_refused(opener: Opener, pace: str) -> None:
    for name in ("shm", "inproc"):
        with pytest.raises(InvalidConfig, match="gbit_per_s"):
            opener(f"{name}:gbit_per_s={pace}", "w")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other"),
        ("dtype", "bfloat16"),
        ("num_layers", 4),
        ("num_kv_heads", 1),
        ("head_dim", 8),
        ("block_size", 32),
        ("version", 2),
    ],
)
@pytest.mark.parametrize("spec", SPECS)
def test_a_bad_pairing_is_refused_naming_the_field(
    opener: Opener, spec: str, field: str, value: object
) -> None:
    prefill, decode = opener(spec, "prefill-0"), opener(spec, "decode-0", layout(**{field: value}))
    with pytest.raises(LayoutMismatch, match=f"hold different KV: {field}: .* != "):
        prefill.transport.connect(decode.descriptor)
    with pytest.raises(TransportError):
        prefill.transport.write(write(0, [0], [0]))


def test_write_to_a_stranger_is_refused(pair: tuple[Side, Side]) -> None:
    prefill, _ = pair
    stranger = Write(
        ticket_id=TICKET, peer=WorkerId("decode-9"), layer=0, source_blocks=[0], target_blocks=[0]
    )
    with pytest.raises(TransportError, match="decode-9"):
        prefill.transport.write(stranger)
    with pytest.raises(TransportError, match="decode-9"):
        prefill.transport.notify(WorkerId("decode-9"), Filling(ticket_id=TICKET))
    with pytest.raises(TransportError):
        prefill.transport.write(write(0, [0, 1], [0]))


@pytest.mark.parametrize(
    ("layer", "source", "target"),
    [
        (0, [NUM_BLOCKS], [0]),
        (0, [0], [NUM_BLOCKS]),
        (0, [4, 5, 6], [0, 1, 2]),
        (NUM_LAYERS, [0], [0]),
        (0, [-2], [0]),
        (0, [0], [-2]),
        (0, [-2], [-2]),
        (-1, [0], [0]),
    ],
)
def test_out_of_range_is_a_failed_write_that_touched_nothing(
    pair: tuple[Side, Side], layer: int, source: list[int], target: list[int]
) -> None:
    prefill, decode = pair
    before = decode.store.pages.clone()
    prefill.transport.write(write(layer, source, target))
    (event,) = prefill.outcomes(1)
    assert isinstance(event, WriteFailed), event
    assert event.reason
    assert torch.equal(decode.store.pages.view(torch.uint8), before.view(torch.uint8))
    prefill.transport.write(write(0, [0], [0]))
    assert isinstance(prefill.outcomes(1)[0], WriteDone), "the writer goes on afterwards"


def test_a_source_that_never_becomes_ready_is_a_failed_write(pair: tuple[Side, Side]) -> None:
    prefill, _ = pair

    def broken() -> None:
        raise RuntimeError("the device is lost")

    prefill.transport.write(write(0, [0], [0], ready=broken))
    (event,) = prefill.outcomes(1)
    assert isinstance(event, WriteFailed)
    assert "the device is lost" in event.reason


def test_nothing_is_written_before_it_is_ready(pair: tuple[Side, Side]) -> None:
    prefill, decode = pair
    gate = threading.Event()
    prefill.transport.write(write(0, [0], [0], ready=lambda: gate.wait(5) and None))
    time.sleep(0.02)
    assert prefill.transport.poll() == []
    prefill.store.pages[0, :, 0] = 3.5
    gate.set()
    prefill.outcomes(1)
    assert bool((decode.store.pages[0, :, 0] == 3.5).all())


def test_cancel_forgets_queued_and_finished_writes_of_that_ticket_only(pair: tuple[Side, Side]) -> None:
    prefill, decode = pair
    gate = threading.Event()
    mine = decode.store.pages[:, :, 1].clone()
    prefill.transport.write(write(0, [0], [0], "other", ready=lambda: gate.wait(5) and None))
    for layer in range(NUM_LAYERS):
        prefill.transport.write(write(layer, [1], [1], "gone"))
    prefill.transport.write(write(1, [0], [0], "other"))
    prefill.transport.cancel(TicketId("gone"))
    gate.set()
    events = prefill.outcomes(2)
    time.sleep(0.02)
    events += prefill.transport.poll()
    assert [event.write.ticket_id for event in events if isinstance(event, WriteDone)] == ["other", "other"]
    assert torch.equal(decode.store.pages[:, :, 1].view(torch.uint8), mine.view(torch.uint8))
    prefill.transport.write(write(0, [2], [2], "late"))
    while not torch.equal(decode.store.pages[0, :, 2], prefill.store.pages[0, :, 2]):
        time.sleep(0.001)
    prefill.transport.cancel(TicketId("late"))
    assert prefill.transport.poll() == [], "a finished write of a cancelled ticket is not reported"


def test_after_cancel_returns_nothing_is_written_or_reported(pair: tuple[Side, Side]) -> None:
    prefill, decode = pair
    everything = list(range(NUM_BLOCKS))
    for attempt in range(60):
        ticket = f"t{attempt}"
        for layer in (0, 1, 2, 0, 1, 2):
            prefill.transport.write(write(layer, everything, everything, ticket))
        time.sleep(0.00007 * (attempt % 8))
        prefill.transport.cancel(TicketId(ticket))
        decode.store.pages.view(torch.uint8).fill_(9)
        assert prefill.transport.poll() == []
        time.sleep(0.0005)
        assert bool((decode.store.pages.view(torch.uint8) == 9).all()), "a cancelled write landed"
        assert prefill.transport.poll() == []


def test_cancel_of_an_unknown_ticket_is_harmless(pair: tuple[Side, Side]) -> None:
    pair[0].transport.cancel(TicketId("never"))
    pair[0].transport.write(write(0, [0], [0]))
    assert isinstance(pair[0].outcomes(1)[0], WriteDone)


def test_notifications_arrive_whole_and_in_order(pair: tuple[Side, Side]) -> None:
    prefill, decode = pair
    sent = [Filling(ticket_id=TicketId(f"t{i}")) for i in range(20)]
    filled = Filled(
        ticket_id=TICKET, layout_fingerprint=layout().fingerprint(), num_tokens=3, num_bytes=4, digests=("a",)
    )
    for message in (*sent, filled):
        prefill.transport.notify(DECODE, message)
    assert decode.outcomes(21) == [Notice(message) for message in (*sent, filled)]
    assert prefill.transport.poll() == []


def test_what_is_no_notification_is_counted_and_left(opener: Opener) -> None:
    prefill, decode = connected(opener, "shm")
    stranger: Any = prefill.transport
    for message in (b"junk", msgspec.msgpack.encode({"type": "Shutdown"})):
        stranger._outboxes[DECODE].send(message)
    prefill.transport.notify(DECODE, Filling(ticket_id=TICKET))
    assert decode.outcomes(1) == [Notice(Filling(ticket_id=TICKET))]
    assert decode.transport.telemetry()["rejected_notifications"] == 2


@pytest.mark.parametrize("spec", ["shm", pytest.param("nixl", marks=without_nixl)])
def test_a_descriptor_without_its_address_is_refused(opener: Opener, spec: str) -> None:
    prefill, decode = opener(spec, "prefill-0"), opener(spec, "decode-0")
    with pytest.raises(TransportError, match="descriptor of decode-0"):
        prefill.transport.connect(msgspec.structs.replace(decode.descriptor, address={}))


@pytest.mark.parametrize("news", ["write", "notification"])
def test_pollables_wake_a_poller_and_rest_afterwards(pair: tuple[Side, Side], news: str) -> None:
    prefill, decode = pair
    side = prefill if news == "write" else decode
    poller = zmq.Poller()
    for pollable in side.transport.pollables():
        poller.register(pollable, zmq.POLLIN)
    assert not poller.poll(0)
    if news == "write":
        prefill.transport.write(write(0, [0], [0]))
    else:
        prefill.transport.notify(DECODE, Filling(ticket_id=TICKET))
    assert poller.poll(5000), "nobody was woken"
    assert len(side.transport.poll()) == 1
    assert not poller.poll(0), "awake with nothing to do: a busy loop"


def test_telemetry_counts_exactly(pair: tuple[Side, Side]) -> None:
    prefill, _ = pair
    for layer in range(NUM_LAYERS):
        prefill.transport.write(write(layer, [0, 2], [1, 4]))
    prefill.outcomes(NUM_LAYERS)
    prefill.transport.notify(DECODE, Filling(ticket_id=TICKET))
    counted = prefill.transport.telemetry()
    assert counted["writes"] == NUM_LAYERS
    assert counted["bytes_written"] == 2 * layout().block_bytes
    assert counted["notifications"] == 1
    assert counted["write_ns"] > 0
    assert not [name for name in counted if name.startswith("fault_")]


def test_connecting_again_replaces_the_peer(pair: tuple[Side, Side]) -> None:
    prefill, decode = pair
    prefill.transport.connect(decode.descriptor)
    prefill.transport.notify(DECODE, Filling(ticket_id=TICKET))
    assert decode.outcomes(1) == [Notice(Filling(ticket_id=TICKET))]


def test_close_with_work_queued_is_prompt_and_safe_twice(pair: tuple[Side, Side]) -> None:
    prefill, _ = pair
    for _ in range(50):
        prefill.transport.write(write(0, [0], [0]))
    start_s = time.monotonic()
    prefill.transport.close()
    prefill.transport.close()
    assert time.monotonic() - start_s < 2
    with pytest.raises(TransportError):
        prefill.transport.write(write(0, [0], [0]))


@pytest.mark.parametrize("spec", SPECS)
def test_close_before_register_leaves_no_thread(tmp_path: Path, spec: str) -> None:
    before = set(threading.enumerate())
    site = Site(worker_id=WorkerId("unborn"), epoch=1, run_directory=str(tmp_path), hub=InprocHub())
    transport = open_transport(spec, site)
    transport.close()
    transport.close()
    assert not set(threading.enumerate()) - before


def test_a_peer_that_left_is_an_error_or_nothing_but_never_a_hang(pair: tuple[Side, Side]) -> None:
    prefill, decode = pair
    decode.transport.close()
    prefill.transport.write(write(0, [0], [0]))
    assert isinstance(prefill.outcomes(1)[0], WriteDone | WriteFailed)
    with contextlib.suppress(TransportError):
        prefill.transport.notify(DECODE, Filling(ticket_id=TICKET))


@pytest.mark.parametrize("spec", SPECS)
def test_connecting_to_a_peer_that_left_is_refused(opener: Opener, spec: str) -> None:
    prefill, decode = opener(spec, "prefill-0"), opener(spec, "decode-0")
    decode.transport.close()
    with pytest.raises(TransportError, match="decode-0"):
        prefill.transport.connect(decode.descriptor)


def test_unknown_transports_and_options_are_refused(opener: Opener) -> None:
    with pytest.raises(UnknownName, match="shm"):
        parse_transport("shmm")
    with pytest.raises(InvalidConfig, match="key=value"):
        parse_transport("faulty:drop")
    for spec in ("shm:x=1", "inproc:x=1", "faulty:inner=shm,dorp=0.1", "faulty:drop=often"):
        with pytest.raises(InvalidConfig, match=r"x|dorp|often"):
            opener(spec, "w")
    with pytest.raises(UnknownName, match="inproc"):
        opener("faulty:inner=mooncake", "w")


@pytest.mark.parametrize("option", ["drop=2", "drop=-1", "drop=nan", "limit=inf", "limit=nan", "delay_s=nan"])
def test_impossible_numbers_are_refused(opener: Opener, option: str) -> None:
    with pytest.raises(InvalidConfig, match=option.split("=")[0]):
        opener(f"faulty:inner=inproc,{option}", "w")


# Faults on demand ---------------------------------------------------------------------------------------


def faulty(opener: Opener, options: str) -> tuple[Side, Side]:
    return connected(opener, f"faulty:inner=inproc,{options}")


def faults(side: Side) -> dict[str, int]:
    return {
        k.removeprefix("fault_"): v for k, v in side.transport.telemetry().items() if k.startswith("fault_")
    }


def settle(side: Side, seconds: float = 0.05) -> list[TransportEvent]:
    events, end_s = list[TransportEvent](), time.monotonic() + seconds
    while time.monotonic() < end_s:
        events += side.transport.poll()
        time.sleep(0.001)
    return events


def test_hang_writes_and_reports_nothing(opener: Opener) -> None:
    prefill, decode = faulty(opener, "hang=1")
    before = decode.store.pages.clone()
    prefill.transport.write(write(0, [0], [0]))
    assert settle(prefill) == []
    assert torch.equal(decode.store.pages.view(torch.uint8), before.view(torch.uint8))
    assert faults(prefill) == {"hang": 1}


def test_fail_reports_failure_and_writes_nothing(opener: Opener) -> None:
    prefill, decode = faulty(opener, "fail=1")
    before = decode.store.pages.clone()
    posted = write(0, [0], [0])
    prefill.transport.write(posted)
    assert settle(prefill) == [WriteFailed(posted, "fault injected")]
    assert torch.equal(decode.store.pages.view(torch.uint8), before.view(torch.uint8))


def test_a_failure_wakes_the_poller_as_any_outcome_does(opener: Opener) -> None:
    prefill, _ = faulty(opener, "fail=1")
    prefill.transport.write(write(0, [0], [0]))
    readable, _, _ = select.select(prefill.transport.pollables(), [], [], 1.0)
    assert readable


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_truncate_claims_all_and_writes_half(opener: Opener, num_blocks: int) -> None:
    prefill, decode = faulty(opener, "truncate=1")
    blocks = list(range(num_blocks))
    expected = decode.store.pages.clone()
    half = blocks[: num_blocks // 2]
    expected[0][:, half] = prefill.store.pages[0][:, half]
    posted = write(0, blocks, blocks)
    prefill.transport.write(posted)
    (event,) = settle(prefill)
    assert isinstance(event, WriteDone)
    assert event.write is posted
    assert event.num_bytes == num_blocks * 2 * layout().page_bytes
    assert torch.equal(decode.store.pages.view(torch.uint8), expected.view(torch.uint8))


def test_bitflip_changes_exactly_one_bit(opener: Opener) -> None:
    prefill, decode = faulty(opener, "bitflip=1")
    posted = write(1, [0, 1], [2, 3])
    prefill.transport.write(posted)
    (event,) = settle(prefill)
    assert isinstance(event, WriteDone)
    assert event.write is posted
    wrong = decode.store.pages[1][:, 2:4].contiguous().view(torch.uint8).flatten()
    right = prefill.store.pages[1][:, 0:2].contiguous().view(torch.uint8).flatten()
    assert sum(int(x).bit_count() for x in (wrong ^ right).tolist()) == 1


def test_bits_are_flipped_only_where_a_peers_pages_are_mapped(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = faulty(opener, "bitflip=1")
    inner: Any = prefill.transport._inner  # type: ignore[attr-defined]
    unmapped = {decode.descriptor.worker_id: object()}
    monkeypatch.setattr(inner, "connect", lambda peer: inner.writer.peers.update(unmapped))
    with pytest.raises(TransportError, match="bitflip: the pages of decode-0 are not mapped here"):
        prefill.transport.connect(decode.descriptor)


def test_delayed_writes_arrive_later_and_whole_unless_cancelled(opener: Opener) -> None:
    prefill, decode = faulty(opener, "delay=1,delay_s=0.05")
    before = decode.store.pages.clone()
    prefill.transport.write(write(0, [0], [0], "kept"))
    prefill.transport.write(write(0, [1], [1], "gone"))
    assert torch.equal(decode.store.pages.view(torch.uint8), before.view(torch.uint8))
    prefill.transport.cancel(TicketId("gone"))
    (event,) = settle(prefill, 0.15)
    assert isinstance(event, WriteDone)
    assert event.write.ticket_id == "kept"
    assert torch.equal(decode.store.pages[0, :, 0], prefill.store.pages[0, :, 0])
    assert torch.equal(decode.store.pages[0, :, 1].view(torch.uint8), before[0, :, 1].view(torch.uint8))


def sent_and_seen(opener: Opener, options: str, count: int = 30) -> list[str]:
    prefill, decode = faulty(opener, options)
    for i in range(count):
        prefill.transport.notify(DECODE, Filling(ticket_id=TicketId(f"{i:02}")))
    settle(prefill, 0.06)
    return [event.message.ticket_id for event in settle(decode, 0.01) if isinstance(event, Notice)]


def test_drop_loses_some(opener: Opener) -> None:
    seen = sent_and_seen(opener, "drop=0.5,seed=3")
    assert 0 < len(seen) < 30
    assert seen == sorted(seen)


def test_duplicate_repeats_and_loses_none(opener: Opener) -> None:
    seen = sent_and_seen(opener, "duplicate=0.5,seed=3")
    assert len(seen) > 30
    assert len(set(seen)) == 30
    assert max(map(seen.count, seen)) == 2


@pytest.mark.parametrize("fault", ["reorder", "delay"])
def test_reorder_changes_the_order_and_loses_none(opener: Opener, fault: str) -> None:
    seen = sent_and_seen(opener, f"{fault}=0.5,seed=3,delay_s=0.03")
    assert seen != sorted(seen)
    assert sorted(seen) == [f"{i:02}" for i in range(30)]


def test_limit_ends_the_mischief(opener: Opener) -> None:
    assert len(sent_and_seen(opener, "drop=1,limit=4")) == 26


def fates(seed: int, pause_s: float) -> list[str]:
    """What became of 40 writes, as their owner saw it."""
    hub, outcomes = InprocHub(), list[TransportEvent]()
    sides = []
    for worker in ("prefill-0", "decode-0"):
        site = Site(worker_id=WorkerId(worker), epoch=1, run_directory="", hub=hub)
        spec = f"faulty:inner=inproc,seed={seed},fail=0.3,hang=0.2,bitflip=0.3"
        sides.append(Side(open_transport(spec, site), layout(), 0))
    prefill, decode = sides
    prefill.transport.connect(decode.descriptor)
    for i in range(40):
        prefill.transport.write(write(0, [0], [0], f"{i:02}"))
        time.sleep(pause_s)
        outcomes += prefill.transport.poll()
    outcomes += settle(prefill)
    for side in sides:
        side.transport.close()
    return sorted(f"{e.write.ticket_id} {type(e).__name__}" for e in outcomes if not isinstance(e, Notice))


def test_a_seed_decides_the_faults_whenever_outcomes_are_polled() -> None:
    assert fates(1, 0.0) == fates(1, 0.002)
    assert fates(1, 0.0) != fates(2, 0.0)


def test_a_tampered_write_that_was_cancelled_leaves_later_ones_alone(opener: Opener) -> None:
    prefill, _ = faulty(opener, "truncate=1,limit=40")
    gate = threading.Event()
    prefill.transport.write(write(0, [], [], "gate", ready=lambda: gate.wait(5) and None))
    for _ in range(39):
        prefill.transport.write(write(0, [0], [0], "gone"))
    prefill.transport.cancel(TicketId("gone"))
    gate.set()
    settle(prefill, 0.02)
    posted = [write(0, [0], [0], f"new{i}") for i in range(40)]
    for item in posted:
        prefill.transport.write(item)
    events = settle(prefill)
    assert [event.write.ticket_id for event in events if isinstance(event, WriteDone)] == [
        item.ticket_id for item in posted
    ]


# Real processes -----------------------------------------------------------------------------------------

WRITER = """
import sys, time, tempfile, msgspec, torch
from kvrelay.cache.store import KVStore
from kvrelay.transport import open_transport
from kvrelay.transport.base import Site, Write, WriteDone
from kvrelay.wire import Descriptor, Filled
peer = msgspec.json.decode(sys.stdin.readline(), type=Descriptor)
site = Site(worker_id="prefill-0", epoch=1, run_directory=sys.argv[1])
transport = open_transport("shm", site)
store = KVStore(peer.layout, 4, transport.allocate(4 * peer.layout.block_bytes), torch.device("cpu"))
store.pages.copy_(torch.randn(store.pages.shape, generator=torch.Generator().manual_seed(5)))
transport.register(store)
transport.connect(peer)
for layer in range(peer.layout.num_layers):
    blocks = {"source_blocks": [3, 1], "target_blocks": [0, 4]}
    transport.write(Write(ticket_id="t", peer=peer.worker_id, layer=layer, **blocks))
events = []
while len(events) < peer.layout.num_layers:
    events += transport.poll()
assert all(isinstance(event, WriteDone) for event in events)
filled = Filled(
    ticket_id="t",
    layout_fingerprint=peer.layout.fingerprint(),
    num_tokens=128,
    num_bytes=sum(event.num_bytes for event in events),
    digests=store.digests([3, 1]),
)
transport.notify(peer.worker_id, filled)
print("written", flush=True)
sys.stdin.readline()
if sys.argv[2] == "clean":
    transport.close()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shm is Linux only")
@pytest.mark.parametrize("ending", ["clean", "killed"])
def test_another_process_writes_into_this_ones_pages(opener: Opener, ending: str) -> None:
    decode = opener("shm", "decode-0", byte=1)
    run_directory = str(decode.descriptor.address["endpoint"]).removeprefix("ipc://").rpartition("/")[0]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, run_directory, ending],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(msgspec.json.encode(decode.descriptor).decode() + "\n")
        child.stdin.flush()
        assert child.stdout.readline() == "written\n"
        (notice,) = decode.outcomes(1)
        assert isinstance(notice, Notice)
        assert isinstance(notice.message, Filled)
        assert notice.message.num_bytes == 2 * layout().block_bytes
        assert decode.store.digests([0, 4], landed=True) == notice.message.digests
        rest = decode.store.pages[:, :, [1, 2, 3, 5]].contiguous().view(torch.uint8)
        assert bool((rest == 1).all())
    finally:
        if ending == "killed":
            child.kill()
        else:
            child.stdin.write("\n")
            child.stdin.flush()
        child.wait(10)
        child.stdin.close()
        child.stdout.close()
    decode.store.pages[0, 0, 0] = 2.0
    assert decode.store.digests([0]), "our pages outlive the writer"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shm is Linux only")
@pytest.mark.parametrize(
    "damage", [{"pid": 2**22 + 1}, {"file": 0}, {"inode": 1}, {"pid": None}, {"endpoint": "x"}]
)
def test_shm_refuses_memory_that_is_not_the_peers(
    opener: Opener, damage: dict[str, int | str | None]
) -> None:
    prefill, decode = opener("shm", "prefill-0"), opener("shm", "decode-0")
    address = {k: v for k, v in {**decode.descriptor.address, **damage}.items() if v is not None}
    forged = msgspec.structs.replace(decode.descriptor, address=address)
    with pytest.raises(TransportError):
        prefill.transport.connect(forged)


def test_shm_leaves_no_file_behind(opener: Opener) -> None:
    decode: Side = opener("shm", "decode-0")
    descriptor: Descriptor = decode.descriptor
    path = f"/proc/{descriptor.address['pid']}/fd/{descriptor.address['file']}"
    assert "memfd" in os.readlink(path)
    decode.transport.close()
    assert not os.path.exists(path)
