"""The ledger: parts that add up under any order of events, and ratios that stay unknown."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.metrics import SPANS, Ledger, Timings, WorkerTotals, phase_report, ratio, worker_report
from kvrelay.types import PHASES, WorkerId
from kvrelay.wire import StepReport
from tiny_engine import hello

ATTEMPT = ("prefill_started", "prefill_finished", "kv_committed", "decode_started")
PARTS = ("queue_s", "prefill_s", "transfer_wait_s", "decode_queue_s", "first_decode_s", "decode_s")
PROMPT_PARTS = PARTS[:-1]


def total(timings: Timings, parts: tuple[str, ...] = PARTS) -> float:
    return float(sum(getattr(timings, part) for part in parts))


def test_one_request_is_split_where_its_events_are() -> None:
    ledger = Ledger()
    for at_s, event in (
        (1.0, "arrived"),
        (1.5, ATTEMPT[0]),
        (2.5, ATTEMPT[1]),
        (2.75, ATTEMPT[2]),
        (3.0, ATTEMPT[3]),
    ):
        ledger.add(event, at_s)
    for at_s in (3.5, 3.75, 4.25):
        ledger.token(at_s)
    assert ledger.timings(4.25) == Timings(
        queue_s=0.5,
        prefill_s=1.0,
        transfer_wait_s=0.25,
        decode_queue_s=0.25,
        first_decode_s=0.5,
        decode_s=0.75,
        ttft_s=2.5,
        e2e_s=3.25,
        itl_s=[0.25, 0.5],
    )


@pytest.mark.parametrize(
    ("transfer_s", "overlap"), [(0.0, None), (1.0, 0.75), (0.25, 0.0), (0.1, 0.0), (25.0, 0.99)]
)
def test_copying_that_nobody_waited_for_is_hidden(transfer_s: float, overlap: float | None) -> None:
    ledger = Ledger(transfer_s=transfer_s)
    for at_s, event in enumerate(("arrived", *ATTEMPT[:2])):
        ledger.add(event, float(at_s))
    ledger.add("kv_committed", 2.25)
    timings = ledger.timings(3.0)
    assert timings.transfer_wait_s == 0.25
    assert timings.transfer_s == transfer_s
    assert timings.transfer_overlap == overlap
    assert total(timings) == timings.e2e_s, "it is no part of the sum"


def test_a_request_that_ended_before_any_token_has_no_ttft() -> None:
    ledger = Ledger()
    ledger.add("arrived", 1.0)
    timings = ledger.timings(3.0)
    assert timings.ttft_s is None
    assert timings.itl_s == []
    assert (timings.queue_s, timings.e2e_s, total(timings)) == (2.0, 2.0, 2.0)


def test_the_spans_are_the_parts_in_order() -> None:
    assert tuple(dict.fromkeys(SPANS.values())) == PARTS
    assert set(PARTS) < set(Timings.__struct_fields__)


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[tuple[float, str]], float]:
    """A request's true history: attempts cut off anywhere, tokens in between; and its end."""
    now_s, events = draw(st.floats(0, 1e6)), []
    gaps = st.floats(0, 10)

    def happen(event: str) -> None:
        nonlocal now_s
        events.append((now_s, event))
        now_s += draw(gaps)

    happen("arrived")
    num_attempts = draw(st.integers(1, 4))
    for attempt in range(num_attempts):
        reached = draw(st.integers(0, 4))
        skips_prefill = draw(st.booleans()) and reached == 4  # a one-token prompt has no prefill
        for event in ATTEMPT[2 if skips_prefill else 0 : reached]:
            happen(event)
        if reached == 4:
            for _ in range(draw(st.integers(0, 3))):
                happen("token")
        if attempt < num_attempts - 1:
            happen("requeued")
    return events, now_s


@given(lives(), st.randoms(use_true_random=False))
def test_parts_sum_to_e2e_and_to_ttft_in_any_order_of_arrival(
    life: tuple[list[tuple[float, str]], float], shuffler: random.Random
) -> None:
    events, end_s = life
    ledger, marks = Ledger(), [(at_s, event) for at_s, event in events if event != "token"]
    tokens = [at_s for at_s, event in events if event == "token"]
    for at_s in tokens:
        ledger.token(at_s)
    late = [mark for mark in marks if shuffler.random() < 0.3]
    for at_s, event in [mark for mark in marks if mark not in late] + late:
        ledger.add(event, at_s)
    timings = ledger.timings(end_s)
    assert timings.e2e_s == pytest.approx(end_s - events[0][0], abs=1e-9)
    assert total(timings) == pytest.approx(timings.e2e_s, abs=1e-6)
    assert all(getattr(timings, part) >= 0 for part in PARTS)
    assert timings.itl_s == pytest.approx([b - a for a, b in pairwise(tokens)])
    if tokens:
        assert timings.ttft_s == pytest.approx(tokens[0] - events[0][0])
        if not any(event == "requeued" and at_s >= tokens[0] for at_s, event in events):
            assert total(timings, PROMPT_PARTS) == pytest.approx(timings.ttft_s, abs=1e-6)
            assert timings.decode_s == pytest.approx(end_s - tokens[0], abs=1e-6)
    else:
        assert timings.ttft_s is None
        assert timings.decode_s == 0.0


def test_a_late_mark_at_the_instant_of_the_first_token_comes_before_it() -> None:
    ledger = Ledger()
    ledger.token(1.0)
    for event, at_s in (("arrived", 0.0), ("decode_started", 1.0), ("kv_committed", 1.0)):
        ledger.add(event, at_s)
    timings = ledger.timings(2.0)
    assert total(timings, PROMPT_PARTS) == timings.ttft_s == 1.0
    assert timings.decode_s == 1.0


def test_a_retry_after_the_first_token_keeps_ttft_and_its_decode_is_decode() -> None:
    ledger = Ledger()
    ledger.add("arrived", 0.0)
    for at_s, event in zip((1.0, 2.0, 3.0, 4.0), ATTEMPT, strict=True):
        ledger.add(event, at_s)
    ledger.token(5.0)
    ledger.add("requeued", 6.0)
    for at_s, event in zip((8.0, 11.0, 11.5, 12.0), ATTEMPT, strict=True):
        ledger.add(event, at_s)
    ledger.token(13.0)
    timings = ledger.timings(13.0)
    assert timings.ttft_s == 5.0
    assert (timings.queue_s, timings.prefill_s) == (3.0, 4.0)
    assert (timings.first_decode_s, timings.decode_s) == (1.0, 2.0)
    assert timings.itl_s == [8.0]


@pytest.mark.parametrize(
    ("amount", "per", "expected"),
    [
        (6, 2, 3.0),
        (0, 2, 0.0),
        (6, 0, None),
        (6, 0.0, None),
        (6, None, None),
        (None, 2, None),
        (None, None, None),
    ],
)
def test_a_ratio_of_the_unknown_is_unknown(
    amount: float | None, per: float | None, expected: float | None
) -> None:
    assert ratio(amount, per) == expected


def totals() -> WorkerTotals:
    return WorkerTotals(hello("w", "prefill", 4))


def step(phase: str, seconds: float, tokens: dict[str, int], moved: dict[str, int]) -> StepReport:
    return StepReport(
        worker_id=WorkerId("w"),
        phase=phase,  # type: ignore[arg-type]
        start_s=1.0,
        end_s=1.0 + seconds,
        cpu_s=0.0,
        num_tokens=tokens,
        moved_bytes=moved,
    )


def test_phases_count_their_own_steps() -> None:
    workers = [totals(), totals()]
    workers[0].add(step("prefill", 2.0, {"a": 10, "b": 20}, {}))
    workers[1].add(step("prefill", 1.0, {"c": 30}, {}))
    workers[1].add(step("transfer", 0.5, {"c": 64}, {"c": 1000}))
    report = phase_report("prefill", workers, 12.0)
    assert (report.num_tokens, report.num_steps, report.busy_s) == (60, 2, 3.0)
    assert (report.tokens_per_s, report.joules, report.tokens_per_joule) == (20.0, 12.0, 5.0)
    assert worker_report(workers[1], None, "prefill").kv_bytes_written == 1000


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_without_work_or_meter_reports_none_not_zero(phase: str) -> None:
    report = phase_report(phase, [totals()], None)  # type: ignore[arg-type]
    assert report.tokens_per_s is None
    assert report.joules is None
    assert report.tokens_per_joule is None
    assert phase_report(phase, [totals()], 0.0).tokens_per_joule is None  # type: ignore[arg-type]


def test_a_worker_that_never_beat_has_unknown_free_blocks() -> None:
    report = worker_report(totals(), None, "prefill")
    assert report.num_free_blocks is None
    assert report.joules is None
    assert report.counters == {}
