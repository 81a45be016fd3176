"""The router's rules at their edges, one worker or request more or less on either side of each."""

from collections.abc import Callable

import pytest
from test_router_core import Desk, desk, mark, request, reserved  # noqa: F401  the fixture

from kvrelay.cache.prefix import Prefixes
from kvrelay.errors import Overloaded, WorkerFailed
from kvrelay.router.admission import WaitingQueue
from kvrelay.router.breaker import COOL_DOWN_S, MAX_FAILURES
from kvrelay.router.core import MAX_DEATHS, Router
from kvrelay.router.counts import RunCounts
from kvrelay.router.fleet import Fleet
from kvrelay.router.load import Job, Load, Pair
from kvrelay.router.policies import open_policy
from kvrelay.router.probes import Probes
from kvrelay.router.settings import RouterSettings
from kvrelay.sampling_params import SamplingParams
from kvrelay.types import BLOCK_SIZE, RequestId, WorkerId
from kvrelay.wire import Abort, NewToken, Reserve, Reserved, StepReport
from tiny_engine import hello


def test_a_request_under_which_workers_keep_dying_is_taken_for_the_cause() -> None:
    updates: list[object] = []
    router = Router(open_policy("least_loaded"), lambda to, what: None, updates.append)
    router.fleet.add(hello("p0", "prefill"))
    for number in range(MAX_DEATHS + 2):
        router.fleet.add(hello(f"d{number}", "decode"))
    routed = request(0)
    router.submit(routed, 0.0)
    for number in range(MAX_DEATHS + 1):
        assert updates == []
        assert routed.decode is not None
        router.on_worker_dead(routed.decode, "killed", float(number))
    (update,) = updates
    assert isinstance(update.error, WorkerFailed)  # type: ignore[attr-defined]
    assert f"gave up after {MAX_DEATHS + 1} attempts" in str(update.error)  # type: ignore[attr-defined]
    assert len(router.fleet.alive("decode")) == 1, "one was left"


def small_pool(limit: int | None, max_num_seqs: int = 64) -> tuple[Router, list[object]]:
    updates: list[object] = []
    settings = RouterSettings(max_queued_requests=limit)
    router = Router(open_policy("least_loaded"), lambda to, what: None, updates.append, settings)
    router.fleet.add(hello("p0", "prefill", 8))
    router.fleet.add(hello("d0", "decode", 8), max_num_seqs)
    return router, updates


def test_a_newcomer_that_would_fit_waits_behind_the_first_of_the_queue() -> None:
    """... or is refused, when the queue is full: none is overtaken for ever."""
    router, _ = small_pool(limit=1)
    router.submit(request(0, 3 * BLOCK_SIZE), 0.0)
    router.submit(request(1, 6 * BLOCK_SIZE), 0.0)
    assert [routed.request_id for routed in (router.queue.first,) if routed] == ["r1"]
    with pytest.raises(Overloaded, match="max_queued_requests=1"):
        router.submit(request(2, 1), 0.0)
    assert len(router.queue) == 1
    router.finish(request(1).request_id, "abort", 0.0)
    router.submit(request(2, 1), 0.0)
    assert len(router.queue) == 0


def test_a_full_queue_refuses_no_request_of_our_own() -> None:
    """A worker's new role is verified by one, on the router's thread."""
    router, _ = small_pool(limit=1)
    router.submit(request(0, 3 * BLOCK_SIZE), 0.0)
    router.submit(request(1, 6 * BLOCK_SIZE), 0.0)
    own = request(2, 1)
    own.pinned = (WorkerId("p0"), WorkerId("d0"))
    router.submit(own, 0.0)
    assert own.request_id in router.requests
    assert router.queue.num_refused == 0


def test_a_full_decode_worker_gets_no_more() -> None:
    router, _ = small_pool(limit=None, max_num_seqs=2)
    for number in range(3):
        router.submit(request(number), 0.0)
    assert router.fleet.loads[WorkerId("d0")].num_requests == 2
    assert len(router.queue) == 1


@pytest.mark.parametrize(("num_used", "fits"), [(4, True), (5, False)])
def test_each_request_keeps_a_block_in_reserve(num_used: int, fits: bool) -> None:
    load = Load(WorkerId("d"), num_requests=3, num_used_blocks=num_used, num_blocks=8)
    assert load.can_decode(1) is fits


def test_an_evicted_block_is_not_cached_any_more() -> None:
    load = Load(WorkerId("d"))
    load.change_cached([b"a", b"b"], [])
    load.change_cached([b"c"], [b"b"])
    assert load.num_cached_tokens([b"a", b"b", b"c"]) == BLOCK_SIZE


def test_joules_are_watts_times_seconds_shared_by_the_batch() -> None:
    """100 prompt tokens at 1,000 a second under 50 W, then 10 tokens in steps of 20 ms under 200 W, by 4."""
    load = Load(WorkerId("w"), num_requests=1, watts={"prefill": 50.0, "decode": 200.0}, max_num_seqs=4)
    load.add_prefill(1000, 1.0)
    for count in (1, 4, 8):
        load.decode_speed.add(count, 0.020)
    for num_others in (3, 30):
        job = Job(num_tokens=100, max_new_tokens=10, num_others=num_others)
        assert Pair(load, load).joules(job) == pytest.approx(50 * 0.1 + 200 * 0.020 / 4 * 10)
    alone = Job(num_tokens=100, max_new_tokens=10)
    assert Pair(load, load).joules(alone) == pytest.approx(50 * 0.1 + 200 * 0.020 / 2 * 10)


def test_who_is_moved_away_is_stopped_where_it_was(desk: Desk) -> None:  # noqa: F811
    desk.router.submit(request(0), 0.0)
    ((_, reserve),) = desk.taken()
    assert isinstance(reserve, Reserve)
    desk.says(reserved(reserve.request))
    desk.router.fleet.loads[WorkerId("d0")].is_draining = True
    desk.router.move_away(WorkerId("d0"), 2.0)
    sent = desk.taken()
    assert [(to, type(what)) for to, what in sent] == [("d0", Abort), ("p0", Abort), ("d1", Reserve)]
    assert [what.attempt for _, what in sent[:2]] == [1, 1]  # type: ignore[union-attr]


def test_a_deciding_request_that_is_ended_from_outside_leaves_the_decision_to_the_next(desk: Desk) -> None:  # noqa: F811
    breaker = desk.router.fleet.loads[WorkerId("d0")].breaker
    for _ in range(MAX_FAILURES):
        breaker.on_failure(RequestId("earlier"), 0.0)
    desk.router.fleet.workers[WorkerId("d1")].is_alive = False
    desk.router.submit(request(0), COOL_DOWN_S)
    assert not breaker.allows(COOL_DOWN_S)
    desk.router.finish(request(0).request_id, "abort", COOL_DOWN_S)
    assert breaker.allows(COOL_DOWN_S)


def test_without_a_threshold_even_a_cached_prompt_is_handed_over() -> None:
    """What decode says it has cached may be gone by then, and it would compute the prompt."""
    from kvrelay.cache.prefix import block_hashes

    for threshold, is_local in ((0, False), (1, True)):
        fleet = Fleet(RouterSettings(local_prefill_tokens=threshold))
        fleet.add(hello("p0", "prefill"))
        fleet.add(hello("d0", "decode"))
        routed = request(0, 2 * BLOCK_SIZE + 1 + threshold)
        layout = fleet.workers[WorkerId("d0")].hello.descriptor.layout
        fleet.loads[WorkerId("d0")].change_cached(block_hashes(routed.token_ids, layout.fingerprint()), [])
        pairs = fleet.pairs(routed, fleet.job(routed), 0.0)
        assert [pair.is_local for pair in pairs] == [is_local]


def test_the_queue_has_room_for_exactly_its_limit() -> None:
    queue = WaitingQueue(2)
    for number in range(2):
        queue.check_room(0.0)
        queue.add(request(number))
    with pytest.raises(Overloaded):
        queue.check_room(0.0)
    assert queue.num_refused == 1


def test_a_waiting_request_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is looked at; and again when it has more tokens."""
    router, _ = small_pool(None, max_num_seqs=1)
    router.fleet.loads[WorkerId("d0")].change_cached([b"x"], [])
    named: list[int] = []
    names = Prefixes.names

    def spy(prefixes: Prefixes, params: SamplingParams, token_ids: list[int], count: int) -> list[bytes]:
        named.append(len(token_ids))
        return names(prefixes, params, token_ids, count)

    monkeypatch.setattr(Prefixes, "names", spy)
    running, waiting = request(0, 5), request(1, 200)
    router.submit(running, 0.0)
    router.submit(waiting, 0.0)
    for _ in range(20):
        router.tick(1.0)
    assert named == [5, 200]
    waiting.token_ids.append(1)
    router.finish(running.request_id, "abort", 2.0)
    assert waiting.decode is not None
    assert named == [5, 200, 201]


def test_a_request_of_our_own_is_in_nobodys_books() -> None:
    router, updates = small_pool(None)
    noted: list[str] = []

    class Notes:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *given: noted.append(name)

    router.observer = Notes()
    pair = (WorkerId("p0"), WorkerId("d0"))
    name = Probes(router).send("x", pair, 1.0, lambda routed, update: None)
    router.on_message(Reserved(request_id=name, attempt=1, ticket=None, at_s=1.0), 1.0)
    for token_id in (7, 8):
        new = NewToken(
            request_id=name, attempt=1, token_id=token_id, finish_reason="length" if token_id == 8 else None
        )
        times = {"start_s": 1.0, "end_s": 2.0, "cpu_s": 0.0}
        router.on_message(
            StepReport(worker_id=pair[1], phase="decode", num_tokens={name: 1}, tokens=(new,), **times), 2.0
        )
    assert updates[-1].finish_reason == "length"  # type: ignore[attr-defined]
    assert router.counts == RunCounts()
    assert noted == []
