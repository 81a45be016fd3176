"""Contracts 3 and 4 at a worker's two sides: leases, hung writes, aborts, bad hand-offs, shutdown.

Model, transport and clock are fakes; the pool, the tickets, the schedulers and the pages are real.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from kvrelay.cache.arrivals import Arrivals, Lacking, Tiles
from kvrelay.cache.pool import BlockPool
from kvrelay.cache.prefix import Prefixes
from kvrelay.cache.store import KVStore
from kvrelay.codec import encode
from kvrelay.config import EngineConfig, WorkerConfig
from kvrelay.errors import TransportError
from kvrelay.sampling_params import SamplingParams
from kvrelay.scheduler.decode import PENDING, DecodeScheduler, DecodeSequence
from kvrelay.scheduler.prefill import Chunk, PrefillJob
from kvrelay.sparse import AttentionUse, SparseAttention
from kvrelay.transport.base import Write, WriteDone, WriteFailed
from kvrelay.types import KVLayout, RequestId, RequestSpec, TicketId, TransferTicket, WorkerId, num_blocks
from kvrelay.wire import (
    Abort,
    Arrived,
    AttemptFailed,
    Filled,
    Filling,
    Mark,
    Message,
    Prefill,
    Reserve,
    Reserved,
    StepReport,
    Wanted,
    WriterGone,
)
from kvrelay.worker import relay
from kvrelay.worker.decode import DecodeSide
from kvrelay.worker.parts import WorkerParts
from kvrelay.worker.prefill import PrefillSide

LEASE_S = 8.0
NUM_BLOCKS = 8
LAYOUT = KVLayout(model="fake", dtype="float32", num_layers=3, num_kv_heads=1, head_dim=2)


class FakeClock:
    """Stands in for the `time` module of both sides."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def process_time(self) -> float:
        return 0.0


class FakeTransport:
    """Remembers what was asked of it; writes complete when the test says so."""

    def __init__(self) -> None:
        self.writes: list[Write] = []
        self.notices: list[tuple[WorkerId, Message]] = []
        self.cancelled: list[TicketId] = []
        self.is_broken = False

    def write(self, write: Write) -> None:
        place = len([each for each in self.writes if each.is_urgent]) if write.is_urgent else len(self.writes)
        self.writes.insert(place, write)

    def withdraw(self, write: Write) -> bool:
        self.writes = [each for each in self.writes if each is not write]
        return True

    def cancel(self, ticket_id: TicketId) -> None:
        self.cancelled.append(ticket_id)
        self.writes = [write for write in self.writes if write.ticket_id != ticket_id]

    def notify(self, peer: WorkerId, message: Message) -> None:
        if self.is_broken:
            raise TransportError(f"{peer} does not read its notifications")
        self.notices.append((peer, message))

    def told(self, kind: type[Message]) -> list[Any]:
        return [message for _, message in self.notices if isinstance(message, kind)]


class FakeRunner:
    """Every layer takes `layer_s`; every sequence's next token is 7, None if its prompt begins with 13."""

    eos_token_ids = frozenset({1})

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.watched: list[Tiles] = []
        self.sparse: SparseAttention | None = None
        self.lacking: Tiles = {}
        self.layer_s = 0.0
        self.is_ahead = False
        self.fails_at = self.is_lost_at = 0  # the number of the step that cannot be begun, or ended
        self.launched: list[int] = []

    def prefill(self, chunks: Sequence[Chunk], after_layer: Callable[[int], None]) -> torch.Tensor:
        assert chunks
        self.watched = [{} for _ in chunks]
        for layer in range(LAYOUT.num_layers):
            self._clock.now_s += self.layer_s
            after_layer(layer)
        return torch.zeros(sum(chunk.length for chunk in chunks), 1)

    def decode(self, batch: Sequence[DecodeSequence]) -> list[tuple[int, None] | Lacking | None]:
        if self.lacking:
            return [Lacking({layer: set(tiles) for layer, tiles in self.lacking.items()}) for _ in batch]
        return [None if sequence.token_ids[0] == 13 else (7, None) for sequence in batch]

    def launch(
        self, batch: Sequence[DecodeSequence]
    ) -> Callable[[], list[tuple[int, None] | Lacking | None]]:
        assert self.is_ahead or not any(PENDING in sequence.token_ids for sequence in batch)
        self.launched.append(len(batch))
        if len(self.launched) == self.fails_at:
            raise RuntimeError("out of memory")
        sampled, number = self.decode(batch), len(self.launched)

        def wait() -> list[tuple[int, None] | Lacking | None]:
            if number == self.is_lost_at:
                raise RuntimeError("the device is lost")
            self._clock.now_s += self.layer_s
            return sampled

        return wait

    def runs_ahead(self, sequences: Sequence[DecodeSequence]) -> bool:
        return self.is_ahead

    def sparse_of(self, request: object) -> SparseAttention | None:
        return self.sparse

    def attention_by(self, requests: Sequence[object]) -> dict[str, AttentionUse]:
        return {}

    def copy_fence(self) -> None:
        return None


class Bench:
    """One worker's two sides and everything they said."""

    def __init__(self, clock: FakeClock, **settings: Any) -> None:
        engine = EngineConfig(model="fake", lease_s=LEASE_S, **settings)
        config = WorkerConfig(
            worker_id=WorkerId("me"),
            role="colocated",
            index=0,
            epoch=1,
            endpoint="",
            run_directory="",
            model_directory="",
            num_threads=1,
            num_workers=1,
            engine=engine,
        )
        buffer = memoryview(bytearray(NUM_BLOCKS * LAYOUT.block_bytes))
        self.clock, self.transport, self.runner = clock, FakeTransport(), FakeRunner(clock)
        self.pool = BlockPool(NUM_BLOCKS)
        self.store = KVStore(LAYOUT, NUM_BLOCKS, buffer, torch.device("cpu"))
        self.sent: list[Message] = []
        stand_ins: Any = SimpleNamespace(runner=self.runner, transport=self.transport)
        parts = WorkerParts(
            config=config,
            pool=self.pool,
            store=self.store,
            runner=stand_ins.runner,
            transport=stand_ins.transport,
            send=self.sent.append,
        )
        self.decode = DecodeSide(parts)
        self.prefill = PrefillSide(parts, self.decode)

    def said(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]

    def reserve(self, request: RequestSpec) -> TransferTicket:
        """A ticket of this worker's own for the request."""
        self.decode.reserve(Reserve(request=request))
        ticket: TransferTicket = self.said(Reserved)[-1].ticket
        assert ticket.request_id == request.request_id
        return ticket

    def post(self, request: RequestSpec) -> TransferTicket:
        """A prefill job for another worker's ticket."""
        ticket = remote_ticket(request)
        self.prefill.start(Prefill(request=request, ticket=ticket))
        return ticket

    def compute_all(self) -> None:
        while self.prefill.step():
            pass

    def complete(self, count: int | None = None) -> None:
        """Report the oldest writes as done (all of them unless told how many)."""
        done, self.transport.writes = self.transport.writes[:count], self.transport.writes[count or 10**6 :]
        size = 2 * LAYOUT.page_bytes
        now_s = self.clock.now_s
        events = [WriteDone(w, len(w.source_blocks) * size, now_s, now_s) for w in done]
        self.prefill.on_writes_done(events)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    for module in ("prefill", "decode", "early", "generation", "relay"):
        monkeypatch.setattr(f"kvrelay.worker.{module}.time", fake)
    return fake


@pytest.fixture
def bench(clock: FakeClock) -> Bench:
    return Bench(clock, prefill_chunk_tokens=64)


def spec(name: str, num_tokens: int, first: int = 5) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(name),
        attempt=1,
        arrival=0,
        token_ids=(first, *range(20, 19 + num_tokens)),
        num_prompt_tokens=num_tokens,
        max_total_tokens=num_tokens + 4,
        params=SamplingParams(max_tokens=4, temperature=0.0),
        seed=0,
    )


def remote_ticket(request: RequestSpec) -> TransferTicket:
    return TransferTicket(
        ticket_id=TicketId(f"peer/1/{request.request_id}"),
        request_id=request.request_id,
        attempt=request.attempt,
        decode_worker=WorkerId("peer"),
        epoch=1,
        block_ids=tuple(range(num_blocks(request.num_prefill_tokens))),
        num_tokens=request.num_prefill_tokens,
        lease_s=LEASE_S,
    )


def filled(bench: Bench, ticket: TransferTicket, **changes: Any) -> Filled:
    """What an honest writer of this ticket would say, but for `changes`."""
    honest: dict[str, Any] = {
        "ticket_id": ticket.ticket_id,
        "layout_fingerprint": LAYOUT.fingerprint(),
        "num_tokens": ticket.num_tokens,
        "num_bytes": len(ticket.block_ids) * LAYOUT.block_bytes,
        "digests": bench.store.digests(ticket.block_ids),
    }
    return Filled(**{**honest, **changes})


def test_leases_of_remote_jobs_are_renewed_four_times_each(bench: Bench) -> None:
    tickets = [bench.post(spec(name, 130)) for name in "abcdef"]  # more than there are pages for
    for _ in range(9):
        bench.prefill.renew(bench.clock.now_s)
        bench.clock.now_s += LEASE_S / 8
    renewed = [message.ticket_id for message in bench.transport.told(Filling)]
    assert renewed == [ticket.ticket_id for ticket in tickets] * 5  # at 0, 2, 4, 6 and 8 s
    assert {peer for peer, _ in bench.transport.notices} == {"peer"}


def test_a_peer_that_does_not_listen_costs_only_its_own_lease(bench: Bench) -> None:
    bench.post(spec("a", 130))
    bench.transport.is_broken = True
    bench.prefill.renew(bench.clock.now_s)
    assert len(bench.prefill) == 1
    assert not bench.said(AttemptFailed)


def test_leases_of_local_jobs_are_renewed_while_they_wait(bench: Bench) -> None:
    request = spec("a", 130)
    ticket = bench.reserve(request)
    bench.prefill.start(Prefill(request=request, ticket=ticket))
    for _ in range(40):
        bench.clock.now_s += LEASE_S / 4
        bench.prefill.renew(bench.clock.now_s)
        bench.decode.expire(bench.clock.now_s)
    assert not bench.said(AttemptFailed)
    bench.compute_all()
    assert len(bench.decode.scheduler.running) == 1


def test_a_ticket_whose_writer_is_silent_expires_once_and_keeps_its_blocks(bench: Bench) -> None:
    ticket = bench.reserve(spec("a", 130))
    bench.decode.expire(bench.clock.now_s + LEASE_S - 0.01)
    assert not bench.said(AttemptFailed)
    for _ in range(2):
        bench.decode.expire(bench.clock.now_s + LEASE_S)
    (failure,) = bench.said(AttemptFailed)
    assert failure.retryable
    assert "silent for 8 s" in failure.message
    bench.decode.on_notice(filled(bench, ticket))
    assert not bench.decode.scheduler.running
    assert bench.pool.num_free == NUM_BLOCKS - 3, "a writer may still be at work in them"
    bench.decode.writer_gone(WriterGone(ticket_id=ticket.ticket_id, decode_worker=WorkerId("me")))
    assert bench.pool.num_free == NUM_BLOCKS


@pytest.mark.parametrize("is_local", [True, False])
def test_leases_are_renewed_during_one_long_step(bench: Bench, is_local: bool) -> None:
    request, bystander = spec("a", 64), spec("b", 64)
    bench.runner.layer_s = LEASE_S / 2  # one step takes a lease and a half
    if is_local:
        for each in (request, bystander):
            bench.prefill.start(Prefill(request=each, ticket=bench.reserve(each)))
        bench.prefill.step()
        bench.decode.expire(bench.clock.now_s)
        assert not bench.said(AttemptFailed)
        return
    for each in (request, bystander):
        bench.post(each)
    bench.prefill.step()
    renewed = [message.ticket_id for message in bench.transport.told(Filling)]
    assert renewed == ["peer/1/a", "peer/1/b"] * LAYOUT.num_layers


def test_writes_that_do_not_move_for_a_lease_are_given_up(bench: Bench) -> None:
    ticket = bench.post(spec("a", 65))
    bench.compute_all()
    bench.prefill.give_up_hung(bench.clock.now_s + LEASE_S)
    assert not bench.sent or not bench.said(AttemptFailed)
    for _ in range(2):
        bench.prefill.give_up_hung(bench.clock.now_s + LEASE_S + 0.01)
    (failure,) = bench.said(AttemptFailed)
    assert (failure.error, failure.retryable) == ("TransferFailed", True)
    assert "3 KV writes did not complete within 8 s" in failure.message
    assert [gone.ticket_id for gone in bench.said(WriterGone)] == [ticket.ticket_id]
    assert bench.transport.cancelled == [ticket.ticket_id]
    assert bench.pool.num_free == NUM_BLOCKS
    assert len(bench.prefill) == 0


def test_each_write_that_completes_gives_the_others_another_lease(bench: Bench) -> None:
    bench.post(spec("a", 65))
    bench.compute_all()
    for _ in range(LAYOUT.num_layers):
        bench.clock.now_s += 0.9 * LEASE_S
        bench.prefill.give_up_hung(bench.clock.now_s)
        bench.complete(1)
    assert not bench.said(AttemptFailed)
    assert len(bench.transport.told(Filled)) == 1


def test_a_job_without_outstanding_writes_is_not_hung(bench: Bench) -> None:
    bench.post(spec("a", 130))
    bench.prefill.step()
    bench.complete()
    bench.prefill.give_up_hung(bench.clock.now_s + 10 * LEASE_S)
    assert len(bench.prefill) == 1


def test_failed_writes_of_one_ticket_end_its_attempt_once(bench: Bench) -> None:
    ticket, other = bench.post(spec("a", 65)), bench.post(spec("b", 65))
    bench.compute_all()
    for write in [write for write in bench.transport.writes if write.ticket_id == ticket.ticket_id]:
        bench.prefill.on_write_failed(WriteFailed(write, "no such page"))
    (failure,) = bench.said(AttemptFailed)
    assert "writing KV to peer failed: no such page" in failure.message
    assert [gone.ticket_id for gone in bench.said(WriterGone)] == [ticket.ticket_id]
    bench.complete()
    assert [message.ticket_id for message in bench.transport.told(Filled)] == [other.ticket_id]
    assert bench.pool.num_free == NUM_BLOCKS


def test_an_end_that_cannot_be_told_fails_the_attempt(bench: Bench) -> None:
    ticket = bench.post(spec("a", 65))
    bench.compute_all()
    bench.transport.is_broken = True
    bench.complete()
    (failure,) = bench.said(AttemptFailed)
    assert (failure.error, failure.retryable) == ("TransportError", True)
    assert [gone.ticket_id for gone in bench.said(WriterGone)] == [ticket.ticket_id]
    assert bench.pool.num_free == NUM_BLOCKS


def test_a_job_is_handed_over_after_its_last_write_and_not_before(bench: Bench) -> None:
    ticket = bench.post(spec("a", 130))
    bench.compute_all()
    assert [(write.layer, list(write.target_blocks)) for write in bench.transport.writes] == [
        *((layer, [0]) for layer in range(3)),
        *((layer, [1]) for layer in range(3)),
        *((layer, [2]) for layer in range(3)),
    ]
    bench.complete(8)
    assert not bench.transport.told(Filled)
    assert bench.pool.num_free < NUM_BLOCKS
    bench.complete(1)
    assert bench.transport.told(Filled) == [filled(bench, ticket, digests=())]
    assert not bench.said(WriterGone), "decode knows from Filled that the writer is done"
    assert bench.pool.num_free == NUM_BLOCKS
    steps = [step for step in bench.said(StepReport) if step.phase == "transfer"]
    assert sum(step.moved_bytes["a"] for step in steps) == 3 * LAYOUT.block_bytes
    assert sum(step.num_tokens.get("a", 0) for step in steps) == 3 * 64


@pytest.mark.parametrize("state", ["unknown", "queued", "half computed", "half written", "handed over"])
def test_an_abort_with_a_ticket_is_answered_once_at_every_state(bench: Bench, state: str) -> None:
    request = spec("a", 130)
    ticket = remote_ticket(request) if state == "unknown" else bench.post(request)
    if state == "half computed":
        bench.prefill.step()
    if state in ("half written", "handed over"):
        bench.compute_all()
        bench.complete(4 if state == "half written" else None)
    bench.prefill.abort(Abort(request_id=request.request_id, attempt=1, ticket=ticket))
    assert [gone.ticket_id for gone in bench.said(WriterGone)] == [ticket.ticket_id]
    assert bench.said(WriterGone)[0].decode_worker == "peer"
    assert bench.transport.cancelled == [ticket.ticket_id]
    assert (len(bench.prefill), bench.pool.num_free) == (0, NUM_BLOCKS)
    assert not bench.prefill.step()
    assert len(bench.transport.told(Filled)) == (state == "handed over")


def test_a_late_completion_of_an_aborted_ticket_hands_nothing_over(bench: Bench) -> None:
    ticket = bench.post(spec("a", 65))
    bench.compute_all()
    late = [WriteDone(write, 1, 0.0, 0.0) for write in bench.transport.writes]
    bench.prefill.abort(Abort(request_id=RequestId("a"), attempt=1, ticket=ticket))
    bench.prefill.on_writes_done(late)
    assert not bench.transport.told(Filled)
    assert all(not step.moved_bytes for step in bench.said(StepReport))


@pytest.mark.parametrize("state", ["waiting", "reserved", "local, half computed", "running", "over"])
def test_an_abort_on_the_decode_side_frees_all_but_promised_blocks(bench: Bench, state: str) -> None:
    request = spec("a", 130)
    crowd = spec("crowd", 500) if state == "waiting" else None
    if crowd is not None:
        bench.reserve(crowd)
        bench.decode.reserve(Reserve(request=request))
        taken = NUM_BLOCKS - bench.pool.num_free
    else:
        ticket = bench.reserve(request)
        taken = 0
    if state == "local, half computed":
        bench.prefill.start(Prefill(request=request, ticket=ticket))
        bench.prefill.step()
    if state in ("running", "over"):
        bench.decode.on_notice(filled(bench, ticket))
    while state == "over" and bench.decode.step():
        pass
    abort = Abort(request_id=request.request_id, attempt=1)
    for _ in range(2):
        bench.decode.abort(abort)
    is_promised = state in ("reserved", "local, half computed")
    assert NUM_BLOCKS - bench.pool.num_free == (3 if is_promised else taken)
    assert not bench.decode.scheduler.running
    assert not bench.decode.scheduler.waiting
    if is_promised:
        bench.compute_all()  # a local job that is not told yet ends without effect
        bench.decode.on_notice(filled(bench, ticket))
        assert not bench.decode.scheduler.running
        bench.decode.writer_gone(WriterGone(ticket_id=ticket.ticket_id, decode_worker=WorkerId("me")))
        assert bench.pool.num_free == NUM_BLOCKS
    bench.pool.check()


def test_an_abort_of_an_earlier_attempt_leaves_the_later_alone(bench: Bench) -> None:
    bench.reserve(spec("a", 130))
    bench.decode.abort(Abort(request_id=RequestId("a"), attempt=2))
    bench.decode.expire(bench.clock.now_s + LEASE_S)
    assert [failure.attempt for failure in bench.said(AttemptFailed)] == [1], "the ticket was still live"


DEFECTS: dict[str, tuple[dict[str, Any], str]] = {
    "layout": ({"layout_fingerprint": "0" * 16}, "layout 0000000000000000, expected"),
    "tokens": ({"num_tokens": 128}, "128 tokens in"),
    "too few bytes": ({"num_bytes": 2 * LAYOUT.block_bytes}, "expected 129 in"),
    "too many bytes": ({"num_bytes": 4 * LAYOUT.block_bytes}, "expected 129 in"),
    "no digests": ({"digests": ()}, "digests of blocks"),
    "a digest short": ({"digests": ("x", "y")}, "digests of blocks"),
    "a digest too many": ({"digests": ("x", "y", "z", "w")}, "digests of blocks"),
    "a wrong digest": ({"digests": ("x", "y", "z")}, "digests of blocks [0, 1, 2] of 3 differ"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_kv_that_did_not_arrive_whole_is_refused_and_its_blocks_freed(clock: FakeClock, defect: str) -> None:
    bench = Bench(clock, verify_kv=True)
    ticket = bench.reserve(spec("a", 130))
    changes, reason = DEFECTS[defect]
    for _ in range(2):
        bench.decode.on_notice(filled(bench, ticket, **changes))
    (failure,) = bench.said(AttemptFailed)
    assert (failure.error, failure.retryable) == ("TransferFailed", True)
    assert reason in failure.message
    assert not bench.decode.scheduler.running
    assert not [mark for mark in bench.said(Mark) if mark.event == "kv_committed"]
    assert bench.pool.num_free == NUM_BLOCKS


def test_one_flipped_bit_is_found_by_the_digests(clock: FakeClock) -> None:
    bench = Bench(clock, verify_kv=True)
    ticket = bench.reserve(spec("a", 130))
    message = filled(bench, ticket)
    bench.store.pages[2, 1, ticket.block_ids[1], 0, 63, 1] = 1e-30
    bench.decode.on_notice(message)
    (failure,) = bench.said(AttemptFailed)
    assert "blocks [1] of 3" in failure.message


def test_duplicates_commit_once(bench: Bench) -> None:
    ticket = bench.reserve(spec("a", 130))
    for _ in range(3):
        bench.decode.on_notice(filled(bench, ticket, digests=()))
        bench.decode.on_notice(Filling(ticket_id=ticket.ticket_id))
    assert len(bench.decode.scheduler.running) == 1
    assert [mark.event for mark in bench.said(Mark)] == ["kv_committed"]
    while bench.decode.step():
        pass
    bench.decode.on_notice(filled(bench, ticket, digests=()))
    bench.decode.writer_gone(WriterGone(ticket_id=ticket.ticket_id, decode_worker=WorkerId("me")))
    assert bench.pool.num_free == NUM_BLOCKS
    bench.pool.check()


def test_the_writers_end_overtaking_filled_leaves_nothing_to_commit(bench: Bench) -> None:
    ticket = bench.reserve(spec("a", 130))
    bench.decode.writer_gone(WriterGone(ticket_id=ticket.ticket_id, decode_worker=WorkerId("me")))
    second = bench.reserve(spec("b", 130))
    assert second.block_ids == ticket.block_ids
    bench.decode.on_notice(filled(bench, ticket))
    assert not bench.decode.scheduler.running
    bench.decode.on_notice(filled(bench, second))
    assert [sequence.request.request_id for sequence in bench.decode.scheduler.running] == ["b"]


def test_a_one_token_prompt_runs_without_a_ticket(bench: Bench) -> None:
    bench.decode.reserve(Reserve(request=spec("a", 1)))
    (reserved,) = bench.said(Reserved)
    assert reserved.ticket is None
    assert len(bench.decode.scheduler.running) == 1


def test_logits_that_are_not_finite_fail_their_own_request_only(bench: Bench) -> None:
    for name, first in (("sound", 5), ("unsound", 13), ("sound too", 6)):
        bench.decode.reserve(Reserve(request=spec(name, 1, first)))
    while bench.decode.step():
        pass
    (failure,) = bench.said(AttemptFailed)
    assert (failure.request_id, failure.error, failure.retryable) == ("unsound", "ModelError", False)
    tokens = [token for step in bench.said(StepReport) for token in step.tokens]
    assert [token.request_id for token in tokens] == ["sound", "sound too"] * 4
    assert [token.finish_reason for token in tokens[-2:]] == ["length", "length"]
    assert bench.pool.num_free == NUM_BLOCKS


@pytest.mark.parametrize("is_ahead", [False, True])
def test_steps_run_ahead_end_after_the_next_has_begun(bench: Bench, is_ahead: bool) -> None:
    bench.runner.is_ahead = is_ahead
    for name, first in (("sound", 5), ("unsound", 13)):
        bench.decode.reserve(Reserve(request=spec(name, 1, first)))
    bench.runner.layer_s = 0.5
    counts, before_s = [], bench.clock.now_s
    while bench.decode.step():
        bench.clock.now_s += 1.0
        counts.append([len(bench.said(StepReport)), len(bench.runner.launched)])
        is_begun = counts[-1][0] < counts[-1][1]
        begun_s = bench.decode.reported_until(bench.clock.now_s)
        assert begun_s == (before_s if is_begun else bench.clock.now_s)
        before_s = bench.clock.now_s
    steps = [[0, 1], [1, 2], [2, 3], [3, 4], [4, 4]] if is_ahead else [[n, n] for n in (1, 2, 3, 4)]
    assert counts == steps
    assert bench.runner.launched == [2, 2, 1, 1] if is_ahead else [2, 1, 1, 1]
    (failure,) = bench.said(AttemptFailed)
    assert (failure.request_id, failure.error) == ("unsound", "ModelError")
    tokens = [token for step in bench.said(StepReport) for token in step.tokens]
    assert [(token.request_id, token.token_id) for token in tokens] == [("sound", 7)] * 4
    assert [token.finish_reason for token in tokens] == [None, None, None, "length"]
    times = [(step.start_s, step.end_s) for step in bench.said(StepReport)]
    assert all(before[1] <= after[0] for before, after in pairwise(times))
    assert bench.pool.num_free == NUM_BLOCKS
    bench.pool.check()


def test_a_step_that_needs_all_tokens_waits_for_one_that_ran_ahead(bench: Bench) -> None:
    bench.runner.is_ahead = True
    bench.decode.reserve(Reserve(request=spec("a", 1)))
    bench.decode.step()
    bench.runner.is_ahead = False
    while bench.decode.step():
        pass
    assert [token.token_id for step in bench.said(StepReport) for token in step.tokens] == [7] * 4


@pytest.mark.parametrize("event", ["abort", "failure", "abort and loss"])
def test_a_step_under_way_gives_nothing_to_sequences_that_are_gone(bench: Bench, event: str) -> None:
    bench.runner.is_ahead = True
    for name in ("stays", "goes"):
        bench.decode.reserve(Reserve(request=spec(name, 1)))
    bench.decode.step()
    if event != "failure":
        bench.decode.abort(Abort(request_id=RequestId("goes"), attempt=1))
    bench.runner.fails_at, bench.runner.is_lost_at = 2 * (event == "failure"), event == "abort and loss"
    while bench.decode.step():
        pass
    tokens = [token.request_id for step in bench.said(StepReport) for token in step.tokens]
    assert tokens == (["stays"] * 4 if event == "abort" else [])
    failed = {"abort": [], "failure": ["stays", "goes"], "abort and loss": ["stays"]}
    assert [m.request_id for m in bench.said(AttemptFailed)] == failed[event]
    assert bench.pool.num_free == NUM_BLOCKS
    bench.pool.check()


def test_nothing_that_began_before_reported_until_goes_unreported(bench: Bench) -> None:
    """Energy before that time is settled: a write that began earlier and is reported later is lost to it."""
    began: dict[int, float] = {}
    bench.runner.layer_s = 1.0
    bench.post(spec("a", 130))
    reported_s = 0.0
    for _ in range(3):
        bench.prefill.step()
        for index, _ in enumerate(bench.transport.writes):
            began.setdefault(index, bench.clock.now_s)
        reported_s = bench.prefill.reported_until(bench.clock.now_s)
        assert reported_s <= bench.clock.now_s - 2.0, "the first layer's write was posted two seconds ago"
        bench.complete(2)
        still = bench.prefill.reported_until(bench.clock.now_s)
        assert reported_s <= still <= bench.clock.now_s
        bench.clock.now_s += 1.0
        bench.complete()
        assert bench.prefill.reported_until(bench.clock.now_s) == bench.clock.now_s


def test_shutdown_tells_promised_blocks_from_leaked_ones(bench: Bench) -> None:
    running, promised = bench.reserve(spec("running", 65)), bench.reserve(spec("promised", 130))
    bench.decode.on_notice(filled(bench, running))
    bench.post(spec("outgoing", 65))
    bench.prefill.step()
    bench.prefill.close()
    assert bench.decode.close() == 3 == len(promised.block_ids)
    assert bench.pool.num_free == NUM_BLOCKS - 3
    assert bench.transport.cancelled == ["peer/1/outgoing"]
    assert len(bench.prefill) == 0
    assert not bench.decode.step()


def test_shutdown_of_a_colocated_worker_frees_no_block_twice(bench: Bench) -> None:
    request = spec("a", 130)
    bench.prefill.start(Prefill(request=request, ticket=bench.reserve(request)))
    bench.prefill.step()
    bench.prefill.close()
    assert bench.decode.close() == 3
    assert bench.pool.num_free == NUM_BLOCKS - 3
    bench.pool.check()


# Sequences that start before all of their KV has come ---------------------------------------------------

SPARSE = SparseAttention(
    budget_tokens=128, local_blocks=1, dense_layers=(0,), dense_below_tokens=0, candidate_tokens=0
)


@pytest.fixture
def early(clock: FakeClock) -> Bench:
    bench = Bench(clock, prefill_chunk_tokens=256, attention=SPARSE, kv_handoff="sparse")
    bench.runner.sparse = SPARSE
    return bench


def arrived(ticket: TransferTicket, *, may_start: bool, tiles: dict[int, tuple[int, ...]]) -> Arrived:
    return Arrived(
        ticket_id=ticket.ticket_id,
        layout_fingerprint=LAYOUT.fingerprint(),
        may_start=may_start,
        tiles=tiles,
        num_bytes=10,
    )


def started(bench: Bench) -> TransferTicket:
    """A ticket of 4 blocks whose sequence runs on the first of them."""
    ticket = bench.reserve(spec("a", 220))
    bench.decode.on_notice(arrived(ticket, may_start=True, tiles={0: (0, 1, 2)}))
    assert len(bench.decode.scheduler.running) == 1
    assert [mark.event for mark in bench.said(Mark)] == ["kv_usable"]
    return ticket


def gone(ticket: TransferTicket) -> WriterGone:
    return WriterGone(ticket_id=ticket.ticket_id, decode_worker=WorkerId("me"))


def test_a_step_that_lacks_tiles_waits_for_them_and_asks_once(early: Bench) -> None:
    ticket = started(early)
    early.runner.lacking = {1: {3, 4}, 2: {5}}
    assert early.decode.step() == 1
    assert early.decode.step() == 0, "it waits"
    (wanted,) = early.said(Wanted)
    assert (wanted.ticket_id, wanted.tiles) == (ticket.ticket_id, {1: (3, 4), 2: (5,)})
    assert not [token for step in early.said(StepReport) for token in step.tokens]
    early.decode.on_notice(arrived(ticket, may_start=False, tiles={1: (3, 4)}))
    assert early.decode.step() == 0, "not all of it has come"
    early.clock.now_s += 1.5
    early.decode.on_notice(arrived(ticket, may_start=False, tiles={2: (5,), 0: (6,)}))
    early.runner.lacking = {}
    assert early.decode.step() == 1
    step = early.said(StepReport)[-1]
    assert [token.token_id for token in step.tokens] == [7]
    hand_off = step.hand_off["a"]
    assert (hand_off.num_stalls, hand_off.stall_s) == (1, 1.5)
    assert (hand_off.num_bytes, hand_off.bytes_before_first_token) == (20, 20), (
        "the start was reported before"
    )


@pytest.mark.parametrize("twice", ["start", "news", "late start", "early news"])
def test_what_is_told_twice_or_out_of_order_changes_nothing(early: Bench, twice: str) -> None:
    ticket = early.reserve(spec("a", 220))
    start = arrived(ticket, may_start=True, tiles={0: (0, 1)})
    news = arrived(ticket, may_start=False, tiles={1: (2,)})
    order = {
        "start": [start, start, news],
        "news": [start, news, news],
        "late start": [start, news, start],
        "early news": [news, start, news],
    }
    may_start = False
    for message in order[twice]:
        early.decode.on_notice(message)
        may_start |= message.may_start
        assert len(early.decode.scheduler.running) == may_start
    (sequence,) = early.decode.scheduler.running
    assert sequence.arrivals is not None
    rest = sequence.arrivals.rest()
    assert {0, 1} & rest[0] == set()
    assert 2 not in rest[1]
    assert sequence.hand_off.num_bytes == 20
    early.decode.on_notice(filled(early, ticket))
    assert sequence.arrivals is None
    for message in (start, news, filled(early, ticket)):
        early.decode.on_notice(message)
    assert len(early.decode.scheduler.running) == 1
    assert early.pool.num_free == NUM_BLOCKS - 4


@pytest.mark.parametrize("arrivals", [None, Arrivals(TicketId("t"), 1, [1])])
def test_blocks_whose_kv_has_not_all_come_are_not_found_again(arrivals: Arrivals | None) -> None:
    prefixes, pool, request = Prefixes("layout"), BlockPool(6), spec("a", 200)
    scheduler = DecodeScheduler(pool, 8, prefixes)
    scheduler.run(DecodeSequence(request, pool.allocate(4), list(request.token_ids), arrivals=arrivals))
    scheduler.remove(scheduler.running[0])
    assert len(pool.find(prefixes.names_of(request))) == (3 if arrivals is None else 0)
    assert pool.num_free == 6


def test_all_tiles_count_once_all_has_come_though_nobody_told(early: Bench) -> None:
    ticket = started(early)
    early.runner.lacking = {1: {3}}
    early.decode.step()
    early.decode.on_notice(filled(early, ticket))
    (sequence,) = early.decode.scheduler.running
    assert sequence.arrivals is None
    assert [mark.event for mark in early.said(Mark)][-1] == "kv_committed"
    early.runner.lacking = {}
    assert early.decode.step() == 1
    tiles = 4 * 3 * 2 * LAYOUT.page_bytes
    assert sequence.hand_off.num_bytes == 0, "reported"
    total = sum(step.hand_off["a"].num_bytes for step in early.said(StepReport) if step.hand_off)
    assert total == 10 + tiles + 3 * 3 * 11 * 4 - (2 * LAYOUT.page_bytes + 11 * 4), "less what came before"


@pytest.mark.parametrize("end", ["expired", "aborted", "writer gone", "wrong layout"])
def test_a_sequence_ends_with_its_ticket_and_blocks_wait_for_the_writer(early: Bench, end: str) -> None:
    ticket = started(early)
    if end == "expired":
        early.decode.expire(early.clock.now_s + LEASE_S)
        assert early.said(AttemptFailed)[0].error == "LeaseExpired"
    elif end == "aborted":
        early.decode.abort(Abort(request_id=ticket.request_id, attempt=1))
    elif end == "wrong layout":
        news = arrived(ticket, may_start=False, tiles={1: (1,)})
        early.decode.on_notice(msgspec.structs.replace(news, layout_fingerprint="other"))
        assert "layout other" in early.said(AttemptFailed)[0].message
    if end != "writer gone":
        assert not early.decode.scheduler.running
        assert early.pool.num_free == NUM_BLOCKS - 4, "a writer may still be at work in them"
    early.decode.writer_gone(gone(ticket))
    assert not early.decode.scheduler.running
    assert early.pool.num_free == NUM_BLOCKS
    early.decode.on_notice(arrived(ticket, may_start=True, tiles={0: (0,)}))
    assert not early.decode.scheduler.running
    early.pool.check()


def test_a_sequence_that_ends_first_leaves_its_blocks_to_the_writer(early: Bench) -> None:
    ticket = started(early)
    while early.decode.step():
        pass
    assert not early.decode.scheduler.running
    assert early.pool.num_free == NUM_BLOCKS - 4
    assert early.pool.num_cached == 0, "what has not all come must not be found"
    early.decode.on_notice(filled(early, ticket))
    assert early.pool.num_free == NUM_BLOCKS
    early.pool.check()


def test_signs_of_life_go_both_ways_while_the_rest_comes(early: Bench) -> None:
    ticket = started(early)
    for _ in range(9):
        early.prefill.renew(early.clock.now_s)
        early.decode.expire(early.clock.now_s)
        early.decode.on_notice(Filling(ticket_id=ticket.ticket_id))
        early.clock.now_s += LEASE_S / 8
    assert [message.tiles for message in early.said(Wanted)] == [{}] * 5
    assert not early.said(AttemptFailed)


def test_one_long_prefill_step_does_not_silence_what_decodes_beside_it(early: Bench) -> None:
    ticket, request = started(early), spec("b", 64)
    early.prefill.start(Prefill(request=request, ticket=early.reserve(request)))
    early.runner.layer_s = LEASE_S / 2  # a lease and a half for the step
    early.prefill.step()
    assert [message.ticket_id for message in early.said(Wanted)] == [ticket.ticket_id] * LAYOUT.num_layers


def test_a_writer_gives_up_when_decode_is_silent_for_a_lease(
    early: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "TILES_PER_WRITE", 4)  # so that there is enough to write
    ticket = early.post(spec("a", 400))
    early.compute_all()
    while not early.transport.told(Arrived):
        early.complete(1)
    assert early.transport.told(Arrived)[0].may_start
    early.clock.now_s += 0.9 * LEASE_S
    early.prefill.on_wanted(Wanted(ticket_id=ticket.ticket_id))
    early.complete(1)  # the link moves; only decode's silence is at stake
    early.clock.now_s += 0.9 * LEASE_S
    early.prefill.give_up_hung(early.clock.now_s)
    assert not early.said(AttemptFailed)
    early.complete(1)
    early.clock.now_s += 0.2 * LEASE_S
    early.prefill.give_up_hung(early.clock.now_s)
    (failure,) = early.said(AttemptFailed)
    assert (failure.error, failure.retryable) == ("LeaseExpired", True)
    assert "decode was silent for 8 s" in failure.message
    assert early.said(WriterGone)
    assert early.pool.num_free == NUM_BLOCKS


def test_what_no_message_can_name_is_handed_off_in_full(
    early: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = tuple(range(2**32 - 1000, 2**32))
    message = arrived(remote_ticket(spec("a", 400)), may_start=True, tiles={0: numbers, 1: numbers})
    assert len(encode(message)) < 6 * 2 * len(numbers), "what a tile takes of a message"
    num_tiles = num_blocks(399) * LAYOUT.num_parts * LAYOUT.num_layers
    for first, most, parts in ((5, num_tiles, True), (6, num_tiles - 1, False)):
        monkeypatch.setattr(relay, "MAX_TOLD_TILES", most)
        early.transport.notices.clear()
        early.post(spec("a", 400, first))
        early.compute_all()
        while early.transport.writes:
            early.complete(1)
        assert bool(early.transport.told(Arrived)) is parts
        assert early.transport.told(Filled)
        assert early.pool.num_free == NUM_BLOCKS


def test_statistics_of_a_cached_prompt_leave_before_any_layer(
    early: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link takes the first write at once: were it a whole layer, nothing could overtake it."""
    request, posted, write = spec("a", 400), list[Write](), early.transport.write
    job = PrefillJob(request, remote_ticket(request), False, early.pool.allocate(7), early=SPARSE)
    job.num_cached = job.num_computed = 256
    monkeypatch.setattr(early.transport, "write", lambda each: (posted.append(each), write(each)))
    early.prefill._begin(job)
    for layer, first in enumerate(posted[: LAYOUT.num_layers]):
        assert (first.layer, first.parts) == (layer, [LAYOUT.statistics] * 4)
    assert len(posted) > 2 * LAYOUT.num_layers


def test_the_scheduler_takes_no_blocks_of_a_sequence_whose_kv_has_not_come(early: Bench) -> None:
    """Three sequences of a full pool: the oldest needs a block, the youngest is early, the second gives."""
    pool = BlockPool(6)
    scheduler = DecodeScheduler(pool, 8)
    sequences = []
    for number in range(3):
        request = msgspec.structs.replace(spec(f"{number}", 128), arrival=number)
        sequences.append(DecodeSequence(request, pool.allocate(2), list(request.token_ids)))
        scheduler.run(sequences[-1])
    sequences[2].arrivals = Arrivals(TicketId("t"), 1, [1])
    sequences[0].token_ids.append(7)
    batch, preempted = scheduler.plan()
    assert preempted == [sequences[1]]
    assert batch == [sequences[0], sequences[2]]
    sequences[0].token_ids += [7] * 128
    sequences[2].arrivals.lacking = {0: {1}}
    batch, preempted = scheduler.plan()
    assert (batch, preempted) == ([], []), "one has no room, the other waits"
