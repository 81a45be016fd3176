"""The planner: slow to decide, never back and forth, every decision has a reason; a pool that it helps."""

import logging
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.experiments.simulated_worker import WorkerModel
from kvrelay.experiments.simulation import Arrival, Simulation
from kvrelay.router.core import Router
from kvrelay.router.links import Links
from kvrelay.router.planner import (
    MANY_MISSED,
    PATIENCE_S,
    PAUSE_S,
    Decision,
    Planner,
    PoolPlanner,
    PoolState,
    pool_state,
)
from kvrelay.router.policies import open_policy
from kvrelay.router.probes import Probes
from kvrelay.router.roles import RoleChanges
from kvrelay.types import Role, WorkerId
from tiny_engine import hello

CALM = PoolState(num_prefill=2, num_decode=2, prefill_backlog_s=0.0, decode_taken=0.6)
PREFILL_SHORT = PoolState(num_prefill=1, num_decode=3, prefill_backlog_s=9.0, decode_taken=0.1)
DECODE_SHORT = PoolState(num_prefill=3, num_decode=1, prefill_backlog_s=0.0, decode_taken=0.95)
BOTH_SHORT = PoolState(num_prefill=2, num_decode=2, prefill_backlog_s=9.0, decode_taken=0.95)


def decisions(states: list[tuple[PoolState, float]]) -> list[tuple[float, str]]:
    """Time and receiver of each decision, looking once a second; each state holds for so many seconds."""
    planner, now_s, found = Planner(), 0.0, []
    for state, seconds in states:
        end_s = now_s + seconds
        while now_s < end_s:
            decision = planner.decide(state, now_s)
            if decision is not None:
                found.append((now_s, decision.give_to))
            now_s += 1.0
    return found


def test_a_shortage_must_last() -> None:
    assert decisions([(PREFILL_SHORT, PATIENCE_S - 1), (CALM, 5), (PREFILL_SHORT, PATIENCE_S - 1)]) == []
    assert decisions([(PREFILL_SHORT, PATIENCE_S + 1)]) == [(PATIENCE_S, "prefill")]
    assert decisions([(DECODE_SHORT, PATIENCE_S + 1)]) == [(PATIENCE_S, "decode")]


def test_after_a_decision_there_is_a_pause() -> None:
    times = [at_s for at_s, _ in decisions([(PREFILL_SHORT, 300)])]
    assert len(times) > 2
    assert all(later - earlier >= PAUSE_S for earlier, later in pairwise(times))


def test_overload_of_both_pools_moves_nobody_and_neither_does_the_last_worker() -> None:
    assert decisions([(CALM, 100), (BOTH_SHORT, 100)]) == []
    last = PoolState(num_prefill=1, num_decode=1, prefill_backlog_s=9.0, decode_taken=0.1)
    assert decisions([(last, 100)]) == []


def test_missed_gaps_are_a_shortage_of_decode_however_few_slots_are_taken() -> None:
    missed = PoolState(
        num_prefill=2, num_decode=1, prefill_backlog_s=0.0, decode_taken=0.3, itl_missed=MANY_MISSED + 0.01
    )
    assert decisions([(missed, PATIENCE_S + 1)]) == [(PATIENCE_S, "decode")]
    assert decisions([(replace(missed, itl_missed=MANY_MISSED), 100)]) == []


def pool(*roles: Role) -> Router:
    router = Router(open_policy("least_loaded"), lambda to, what: None, lambda update: None)
    for number, role in enumerate(roles):
        router.fleet.add(hello(f"{role}-{number}", role))
    return router


def test_the_backlog_is_shared_by_the_prefill_workers() -> None:
    router = pool("prefill", "prefill", "decode")
    loads = list(router.fleet.loads.values())
    loads[0].num_prefill_tokens = 4000
    loads[0].add_prefill(1000, 1.0)
    loads[1].add_prefill(1000, 1.0)
    loads[2].num_requests = loads[2].max_num_seqs // 4
    state = pool_state(router, 0.2, 0.1)
    assert state == PoolState(
        num_prefill=2,
        num_decode=1,
        prefill_backlog_s=2.0,
        decode_taken=0.25,
        ttft_missed=0.2,
        itl_missed=0.1,
    )


class Desk:
    """What a planner of the pool asks for: nothing is changed, everything is noted."""

    is_busy = False

    def __init__(self) -> None:
        self.begun: list[tuple[str, str]] = []
        self.num_looks = 0

    def begin(self, worker_id: str, role: str, now_s: float, on_done: object) -> None:
        self.begun.append((worker_id, role))

    def missed(self, now_s: float) -> tuple[float, float]:
        self.num_looks += 1
        return (1.0, 0.0)


def test_the_idlest_worker_changes_and_the_pools_are_looked_at_once_a_second() -> None:
    router, note = pool("prefill", "decode", "decode", "decode"), Desk()
    for worker_id, count in (("decode-1", 3), ("decode-2", 1), ("decode-3", 2)):
        router.fleet.loads[WorkerId(worker_id)].num_requests = count
    planner = PoolPlanner(router, note, note)  # type: ignore[arg-type]
    for tenth in range(int(10 * PATIENCE_S) + 1):
        planner.step(tenth / 10)
    assert note.begun == [("decode-2", "prefill")]
    assert note.num_looks == PATIENCE_S + 1
    note.is_busy = True
    planner.step(10 * PAUSE_S)
    assert note.num_looks == PATIENCE_S + 1, "one change at a time"


def planned(router: Router, seconds: int) -> None:
    """Look for so long, every TTFT missed; changes begin, and nobody answers."""
    links = Links(lambda to, what: None, lambda worker_id: router.workers[worker_id].hello.descriptor)
    roles = RoleChanges(router, Probes(router), links)
    planner = PoolPlanner(router, roles, Desk())  # type: ignore[arg-type]
    for now_s in range(seconds):
        planner.step(float(now_s))


def test_a_worker_that_must_stay_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """The idlest has the largest pool: no other could hold what it may be asked to."""
    router = pool("prefill", "decode", "decode")
    router.fleet.add(hello("large", "decode", 128))
    router.fleet.loads[WorkerId("decode-1")].num_requests = 2
    router.fleet.loads[WorkerId("decode-2")].num_requests = 1
    planned(router, 30)
    assert [load.worker_id for load in router.fleet.loads.values() if load.is_draining] == ["decode-2"]
    assert [record.args[0] for record in caplog.records if record.args] == ["decode-2"]


def test_what_cannot_be_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    router = pool("prefill", "decode")
    router.fleet.add(hello("large", "decode", 128))
    router.fleet.loads[WorkerId("large")].is_draining = True
    planned(router, 300)
    (record,) = caplog.records
    assert "no worker can become a prefill worker (prefill has" in record.getMessage()
    assert "one must be left" in record.getMessage()


@pytest.mark.parametrize(("empty", "full"), [("decode", "prefill"), ("prefill", "decode")])
def test_an_empty_pool_gets_a_worker_at_once(empty: Role, full: Role) -> None:
    router = pool(empty, full, full, full)
    router.on_worker_dead(WorkerId(f"{empty}-0"), "killed", 0.0)
    planned(router, 1)
    assert sum(load.is_draining for load in router.fleet.loads.values()) == 1
    state = pool_state(router, 0.0, 0.0)
    planner = Planner()
    first, second = planner.decide(state, 0.0), planner.decide(state, 1.0)
    assert first == second, "no pause: nothing is served meanwhile"
    assert (first.take_from, first.give_to) == (full, empty)  # type: ignore[union-attr]


def test_a_reason_has_the_figures() -> None:
    planner = Planner(slo_ttft_s=0.5)
    planner.decide(PREFILL_SHORT, 0.0)
    decision = planner.decide(PREFILL_SHORT, PATIENCE_S)
    assert isinstance(decision, Decision)
    assert "prefill has 9.00 s of prompts waiting (limit 0.5 s)" in decision.reason
    assert "decode is 10% taken" in decision.reason


@given(
    st.lists(
        st.tuples(
            st.builds(
                PoolState,
                num_prefill=st.integers(1, 4),
                num_decode=st.integers(1, 4),
                prefill_backlog_s=st.floats(0, 10),
                decode_taken=st.floats(0, 1),
                ttft_missed=st.floats(0, 1),
                itl_missed=st.floats(0, 1),
            ),
            st.integers(1, 40),
        ),
        max_size=10,
    )
)
def test_no_two_decisions_within_the_pause_whatever_comes(states: list[tuple[PoolState, float]]) -> None:
    times = [at_s for at_s, _ in decisions(states)]
    assert all(later - earlier >= PAUSE_S for earlier, later in pairwise(times))


@given(
    st.floats(0, 10),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_no_state_asks_for_both_directions(
    backlog_s: float, taken: float, ttft_missed: float, itl_missed: float
) -> None:
    state = PoolState(
        num_prefill=2,
        num_decode=2,
        prefill_backlog_s=backlog_s,
        decode_taken=taken,
        ttft_missed=ttft_missed,
        itl_missed=itl_missed,
    )
    planner = Planner()
    assert planner._prefill_is_short(state) is None or planner._decode_is_short(state) is None


def long_prompts(rate_per_s: float, seconds: float) -> list[Arrival]:
    chance, at_s, trace = random.Random(3), 0.0, []
    while (at_s := at_s + chance.expovariate(rate_per_s)) < seconds:
        trace.append(Arrival(at_s, chance.randint(3000, 5000), chance.randint(5, 15)))
    return trace


def test_a_pool_with_the_wrong_roles_for_its_load_is_put_right(caplog: pytest.LogCaptureFixture) -> None:
    pool = [WorkerModel(worker_id="p0", role="prefill")]
    pool += [WorkerModel(worker_id=f"d{i}", role="decode") for i in range(3)]
    trace = long_prompts(1.2, 240.0)  # more than one prefill worker can do, far less than two
    fixed = Simulation(pool, slo_ttft_s=4.0).run(trace)
    with caplog.at_level(logging.WARNING, "kvrelay"):
        planned = Simulation(pool, slo_ttft_s=4.0, role_planner=True).run(trace)
    assert all(outcome.error is None for outcome in planned.outcomes)
    assert len(planned.router.fleet.alive("prefill")) == 2
    assert "becomes a prefill worker: prefill has" in caplog.text
    assert late(planned) < late(fixed) / 2


def late(run: Simulation) -> int:
    return sum(o.timings is None or (o.timings.ttft_s or 99.0) > 4.0 for o in run.outcomes)
