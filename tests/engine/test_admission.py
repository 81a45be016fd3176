"""Admission under a virtual clock: a bounded queue, deadlines, retry hints; overload is refused."""

import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.errors import DeadlineExceeded, Overloaded
from kvrelay.experiments.simulated_worker import WorkerModel
from kvrelay.experiments.simulation import Arrival, Outcome, Simulation
from kvrelay.outputs import StreamEvent
from kvrelay.router.admission import MAX_RETRY_S, WaitingQueue
from kvrelay.router.request import RoutedRequest
from kvrelay.sampling_params import SamplingParams
from kvrelay.types import RequestId
from tiny_engine import assert_all_blocks_home, greedy, prompts, tiny_llm

POOL = [
    WorkerModel(worker_id="p0", role="prefill"),
    WorkerModel(worker_id="d0", role="decode", max_num_seqs=16),
]


def poisson(rate_per_s: float, seconds: float, seed: int = 0) -> list[Arrival]:
    chance, at_s, trace = random.Random(seed), 0.0, []
    while (at_s := at_s + chance.expovariate(rate_per_s)) < seconds:
        trace.append(Arrival(at_s, chance.randint(50, 800), chance.randint(10, 60)))
    return trace


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def ttfts(outcomes: list[Outcome]) -> list[float]:
    return [o.timings.ttft_s for o in outcomes if o.timings is not None and o.timings.ttft_s is not None]


def request(number: int, priority: int = 0) -> RoutedRequest:
    return RoutedRequest(
        request_id=RequestId(f"r{number}"),
        arrival=number,
        params=SamplingParams(priority=priority),
        seed=0,
        token_ids=[1, 2],
        num_prompt_tokens=2,
        max_total_tokens=4,
    )


def sustainable_rate() -> float:
    """Requests per second that the pool finishes when there is always one more."""
    run = Simulation(POOL).run([Arrival(0.0, 425, 35)] * 400)
    return 400 / run.now_s


@pytest.mark.parametrize("limit", [0, 4, 32])
def test_ten_times_the_sustainable_rate_is_refused_and_what_is_accepted_stays_fast(limit: int) -> None:
    rate = sustainable_rate()
    calm = Simulation(POOL, max_queued_requests=limit).run(poisson(rate / 10, 60.0))
    flood = Simulation(POOL, max_queued_requests=limit).run(poisson(10 * rate, 20.0))
    refused = [o for o in flood.outcomes if isinstance(o.error, Overloaded)]
    accepted = [o for o in flood.outcomes if o.error is None]
    assert len(refused) + len(accepted) == len(flood.outcomes)
    assert 0.85 < len(refused) / len(flood.outcomes) < 0.95, "nine of ten are too many"
    assert len(accepted) / flood.now_s > 0.85 * rate, "throughput does not collapse"
    bound_s = percentile(ttfts(calm.outcomes), 0.99) + (limit + 2) / rate
    assert percentile(ttfts(accepted), 0.99) < 2 * bound_s


def test_without_a_limit_the_same_flood_makes_everyone_wait() -> None:
    rate = sustainable_rate()
    flood = Simulation(POOL).run(poisson(10 * rate, 20.0))
    assert all(o.error is None for o in flood.outcomes)
    assert percentile(ttfts(flood.outcomes), 0.99) > 100.0


def test_a_request_that_has_not_begun_by_its_deadline_ends_with_a_typed_error() -> None:
    rate = sustainable_rate()
    run = Simulation(POOL, max_queued_requests=10_000, queue_timeout_s=2.0).run(poisson(10 * rate, 10.0))
    late = [o for o in run.outcomes if isinstance(o.error, DeadlineExceeded)]
    assert late
    assert all(o.timings is not None and 2.0 <= o.timings.e2e_s < 2.1 and not o.timings.itl_s for o in late)
    assert "had not begun" in str(late[0].error)
    served = ttfts([o for o in run.outcomes if o.error is None])
    assert max(served) < 3.0
    assert len(served) + len(late) == len(run.outcomes)


def test_the_retry_hint_is_the_time_in_which_the_queue_drains() -> None:
    queue = WaitingQueue(limit=8)
    for number in range(8):
        queue.add(request(number))
    with pytest.raises(Overloaded) as first:
        queue.check_room(0.0)
    assert first.value.retry_after_s == 1.0, "no departure seen yet"
    for second in range(5):
        queue.on_dispatched(2.0 * second)  # one every two seconds
    with pytest.raises(Overloaded, match="8 requests wait already; max_queued_requests=8") as known:
        queue.check_room(8.0)
    assert known.value.retry_after_s == pytest.approx(16.0)
    with pytest.raises(Overloaded) as stalled:
        queue.check_room(1e6)
    assert stalled.value.retry_after_s == MAX_RETRY_S
    assert queue.num_refused == 3


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 1000)), unique_by=lambda it: it[1], max_size=30))
def test_the_queue_is_by_priority_then_age_whatever_comes_back_when(items: list[tuple[int, int]]) -> None:
    queue = WaitingQueue(limit=None)
    for priority, number in items:
        queue.add(request(number, priority))
    order = []
    while (first := queue.first) is not None:
        queue.remove(first)
        order.append((first.params.priority, first.arrival))
    assert order == sorted(items)
    queue.check_room(0.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 20), st.sampled_from([0.2, 2.0, 20.0]), st.booleans())
def test_every_simulated_request_ends_once_and_loads_return_to_zero(
    seed: int, limit: int, rate: float, has_deadline: bool
) -> None:
    timeout_s = 1.0 if has_deadline else None
    run = Simulation(POOL, max_queued_requests=limit, queue_timeout_s=timeout_s).run(poisson(rate, 5.0, seed))
    assert not run.router.requests
    assert len(run.router.queue) == 0
    for outcome in run.outcomes:
        assert (outcome.timings is not None) or isinstance(outcome.error, Overloaded)
    for load in run.router.fleet.loads.values():
        assert (load.num_prefill_tokens, load.num_prompts, load.num_requests, load.num_used_blocks) == (
            0,
        ) * 4


def test_a_running_engine_refuses_what_is_too_much_and_serves_the_rest(tiny_directory: Path) -> None:
    ended: list[StreamEvent] = []
    with tiny_llm(tiny_directory, max_num_seqs=2, max_queued_requests=3) as llm:
        prepared = llm.engine.prepare(prompts(20)[0], greedy(200))
        for _ in range(20):
            llm.engine.submit(prepared, ended.append)
        while len([event for event in ended if event.error or event.output]) < 20:
            time.sleep(0.02)
        assert len(llm.generate(prompts(20), greedy(4))) == 1, "there is room again"
        assert b"requests_refused_total" in llm.engine.metrics()
        assert_all_blocks_home(llm)
    refused = [event.error for event in ended if isinstance(event.error, Overloaded)]
    served = [event.output for event in ended if event.output is not None]
    assert len(refused) + len(served) == 20
    assert 5 <= len(served) <= 8, "two decode, three wait, and a few took their places"
    assert all(1.0 <= error.retry_after_s <= MAX_RETRY_S for error in refused)
    assert all(len(output.token_ids) == 200 for output in served)
