"""The circuit breaker: opens after failures in a row, tries one request after a pause."""

from collections.abc import Sequence

import pytest
from test_router_core import Desk, desk, mark, request  # noqa: F401  the fixture

from kvrelay.router.breaker import COOL_DOWN_S, MAX_COOL_DOWN_S, MAX_FAILURES, WINDOW_S, Breaker
from kvrelay.router.load import Job, Pair
from kvrelay.types import RequestId
from kvrelay.wire import AttemptFailed

PROBE, OTHER = RequestId("probe"), RequestId("other")


def opened(at_s: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(MAX_FAILURES):
        assert breaker.allows(at_s)
        breaker.on_sent(PROBE, at_s)
        breaker.on_failure(PROBE, at_s)
    return breaker


def test_it_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker()
    for _ in range(3):
        for _ in range(MAX_FAILURES - 1):
            breaker.on_failure(PROBE, 1.0)
        breaker.on_success()
    assert breaker.state(1.0) == "closed"
    assert opened(1.0).state(1.0) == "open"


def test_failures_far_apart_do_not_open_it() -> None:
    breaker = Breaker()
    for number in range(4 * MAX_FAILURES):
        breaker.on_failure(PROBE, number * WINDOW_S / (MAX_FAILURES - 2))
        assert breaker.state(number * WINDOW_S) == "closed"


def test_after_the_pause_one_request_decides() -> None:
    breaker = opened()
    assert not breaker.allows(COOL_DOWN_S - 0.01)
    assert breaker.state(COOL_DOWN_S) == "half_open"
    breaker.on_sent(PROBE, COOL_DOWN_S)
    assert not breaker.allows(COOL_DOWN_S), "one at a time"
    breaker.on_success()
    assert breaker.state(COOL_DOWN_S) == "closed"


def test_a_failed_probe_doubles_the_pause_up_to_a_limit() -> None:
    breaker, now_s, pauses = opened(), 0.0, []
    for _ in range(9):
        start_s = now_s
        while not breaker.allows(now_s):
            now_s += 0.5
        pauses.append(now_s - start_s)
        breaker.on_sent(PROBE, now_s)
        breaker.on_failure(PROBE, now_s)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, *[MAX_COOL_DOWN_S] * 3]


def test_a_success_makes_the_next_pause_short_again() -> None:
    breaker = opened()
    breaker.on_sent(PROBE, COOL_DOWN_S)
    breaker.on_failure(PROBE, COOL_DOWN_S)
    breaker.on_sent(PROBE, COOL_DOWN_S + 2 * COOL_DOWN_S)
    breaker.on_success()
    for _ in range(MAX_FAILURES):
        breaker.on_failure(PROBE, 10.0)
    assert not breaker.allows(10.0 + COOL_DOWN_S - 0.01)
    assert breaker.allows(10.0 + COOL_DOWN_S)


def test_an_aborted_probe_leaves_the_decision_to_the_next() -> None:
    breaker = opened()
    breaker.on_sent(PROBE, COOL_DOWN_S)
    breaker.on_withdrawn(PROBE)
    assert breaker.allows(COOL_DOWN_S)


def test_who_was_there_before_does_not_decide() -> None:
    breaker = opened()
    breaker.on_sent(PROBE, COOL_DOWN_S)
    breaker.on_sent(OTHER, COOL_DOWN_S)
    breaker.on_withdrawn(OTHER)
    assert not breaker.allows(COOL_DOWN_S), "the first one is still out"
    breaker.on_failure(OTHER, COOL_DOWN_S)
    assert breaker.allows(2 * COOL_DOWN_S), "the pause is not doubled"


def failed(number: int, attempt: int) -> AttemptFailed:
    return AttemptFailed(
        request_id=request(number).request_id,
        attempt=attempt,
        error="TransferFailed",
        message="x",
        retryable=True,
    )


class PreferFirst:
    """A policy that would always send everything to the same two workers."""

    def choose(self, job: Job, pairs: Sequence[Pair]) -> Pair:
        return min(pairs, key=lambda pair: (pair.prefill.worker_id, pair.decode.worker_id))


@pytest.mark.parametrize("bad", ["p0", "d0"])
def test_a_worker_that_fails_is_left_alone_and_its_partners_are_not(desk: Desk, bad: str) -> None:  # noqa: F811
    """Every attempt through one worker fails, every other works."""
    desk.router.policy, now_s = PreferFirst(), 0.0
    for number in range(20):
        now_s += 0.01
        desk.router.submit(request(number), now_s)
        routed = desk.router.requests[request(number).request_id]
        while bad in (routed.prefill, routed.decode):
            assert routed.attempt < 4
            desk.router.on_message(failed(number, routed.attempt), now_s)
        desk.router.on_message(mark(routed.attempt, "kv_committed", now_s, number), now_s)
        desk.router.finish(routed.request_id, "abort", now_s)
    loads = desk.router.fleet.loads.values()
    states = {load.worker_id: load.breaker.state(now_s) for load in loads}
    assert states == {w: "open" if w == bad else "closed" for w in ("p0", "p1", "d0", "d1")}


@pytest.mark.parametrize("worker", ["p0", "d0"])
def test_with_every_breaker_of_a_role_open_requests_are_sent_all_the_same(desk: Desk, worker: str) -> None:  # noqa: F811
    for load in desk.router.fleet.loads.values():
        if load.worker_id.startswith(worker[0]):
            load.breaker = opened()
    desk.router.submit(request(0), 0.0)
    assert desk.router.requests[request(0).request_id].decode is not None
