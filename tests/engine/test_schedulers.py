"""Schedulers: who is admitted, who runs, who yields; and that nobody waits for ever."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.cache.pool import BlockPool
from kvrelay.scheduler.decode import DecodeScheduler, DecodeSequence
from kvrelay.scheduler.prefill import PrefillJob, PrefillScheduler
from kvrelay.types import (
    BLOCK_SIZE,
    RequestId,
    RequestSpec,
    SamplingParams,
    TicketId,
    TransferTicket,
    WorkerId,
    num_blocks,
)


def spec(
    arrival: int, num_tokens: int, max_tokens: int = 16, attempt: int = 1, **params: object
) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(f"r{arrival}"),
        attempt=attempt,
        arrival=arrival,
        token_ids=tuple(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        max_total_tokens=num_tokens + max_tokens,
        params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        seed=0,
    )


def job(arrival: int, num_tokens: int, local_blocks: Sequence[int] | None = None) -> PrefillJob:
    """A job of `num_tokens` tokens to compute: one fewer than the request has."""
    request = spec(arrival, num_tokens + 1)
    ticket = TransferTicket(
        ticket_id=TicketId(f"t{arrival}"),
        request_id=request.request_id,
        attempt=1,
        decode_worker=WorkerId("decode-0"),
        epoch=1,
        block_ids=tuple(local_blocks or ()),
        num_tokens=num_tokens,
        lease_s=1.0,
    )
    return PrefillJob(request, ticket, is_local=local_blocks is not None)


def lengths(scheduler: PrefillScheduler) -> list[tuple[str, int, int]]:
    return [(chunk.job.request.request_id, chunk.start, chunk.length) for chunk in scheduler.plan()]


def compute(scheduler: PrefillScheduler) -> list[tuple[str, int, int]]:
    chunks = scheduler.plan()
    for chunk in chunks:
        chunk.job.num_computed += chunk.length
    return [(chunk.job.request.request_id, chunk.start, chunk.length) for chunk in chunks]


# Prefill ---------------------------------------------------------------------------------------------


def test_chunks_are_cut_at_multiples_of_the_unit_whatever_else_is_in_the_step() -> None:
    scheduler = PrefillScheduler(BlockPool(40), 512, unit_tokens=256)
    for arrival, num_tokens in enumerate((1, 70, 700, 900)):
        scheduler.add(job(arrival, num_tokens))
    starts = [start for _ in range(8) for _, start, _ in compute(scheduler)]
    assert sorted(set(starts)) == [0, 256, 512, 768]
    assert all(chunked.is_computed for chunked in scheduler)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("chunk_tokens", [64, 128, None])
def test_chunks_cover_a_prompt_once_on_page_borders(num_tokens: int, chunk_tokens: int | None) -> None:
    pool = BlockPool(3)
    scheduler = PrefillScheduler(pool, chunk_tokens)
    scheduler.add(job(0, num_tokens))
    position, pages = 0, list[int]()
    while chunks := scheduler.plan():
        (chunk,) = chunks
        assert chunk.start == position
        assert chunk.start % BLOCK_SIZE == 0
        assert chunk_tokens is None or 0 < chunk.length <= chunk_tokens
        position += chunk.length
        pages += chunk.pages
        chunk.job.num_computed += chunk.length
    assert position == num_tokens
    assert pages == list(range(num_blocks(num_tokens))), "every page is sent exactly once"
    (done,) = list(scheduler)
    assert done.is_computed
    scheduler.remove(done)
    assert pool.num_free == 3


def test_budget_is_shared_oldest_first_and_stays_on_pages() -> None:
    scheduler = PrefillScheduler(BlockPool(16), 256)
    for arrival, num_tokens in enumerate((65, 100, 300)):
        scheduler.add(job(arrival, num_tokens))
    # 256 - 65 = 191 → 128; 128 - 100 = 28 → 0
    assert compute(scheduler) == [("r0", 0, 65), ("r1", 0, 100)]
    assert compute(scheduler) == [("r2", 0, 256)]
    assert compute(scheduler) == [("r2", 256, 44)]
    assert compute(scheduler) == []


def test_a_cut_chunk_goes_on_where_it_stopped_before_younger_jobs() -> None:
    scheduler = PrefillScheduler(BlockPool(16), 128)
    scheduler.add(job(0, 200))
    scheduler.add(job(1, 10))
    assert compute(scheduler) == [("r0", 0, 128)]
    assert compute(scheduler)[0] == ("r0", 128, 72)


def test_whole_prompts_go_one_at_a_time() -> None:
    scheduler = PrefillScheduler(BlockPool(16), None)
    scheduler.add(job(0, 300))
    scheduler.add(job(1, 1))
    assert compute(scheduler) == [("r0", 0, 300)]
    assert compute(scheduler) == [("r1", 0, 1)]


def test_no_small_job_overtakes_one_that_waits_for_pages() -> None:
    pool = BlockPool(3)
    scheduler = PrefillScheduler(pool, 512)
    scheduler.add(job(0, 100))
    assert compute(scheduler) == [("r0", 0, 100)]
    scheduler.add(job(1, 129))
    scheduler.add(job(2, 1))
    assert compute(scheduler) == [], "r2 would fit, but would delay r1 for ever"
    scheduler.remove(next(iter(scheduler)))
    assert compute(scheduler) == [("r1", 0, 129)]
    assert pool.num_free == 0
    for rest in list(scheduler):
        scheduler.remove(rest)
    pool.check()
    assert pool.num_free == 3


def test_local_job_fills_the_tickets_blocks_and_never_frees_them() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    scheduler = PrefillScheduler(pool, 64)
    local = job(0, 65, local_blocks=blocks)
    scheduler.add(local)
    assert lengths(scheduler) == [("r0", 0, 64)]
    assert local.block_ids == blocks
    scheduler.remove(local)
    assert pool.num_free == 2
    assert len(scheduler) == 0


def test_job_removed_before_it_ran_frees_nothing_and_unblocks_the_next() -> None:
    pool = BlockPool(2)
    scheduler = PrefillScheduler(pool, 64)
    large, small = job(0, 129), job(1, 1)
    scheduler.add(large)
    scheduler.add(small)
    assert lengths(scheduler) == []
    scheduler.remove(large)
    assert scheduler.get(large.ticket.ticket_id) is None
    assert lengths(scheduler) == [("r1", 0, 1)]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
    st.sampled_from([64, 128, 256, None]),
    st.integers(5, 12),
    st.randoms(use_true_random=False),
)
def test_prefill_ends_for_any_mix(
    sizes: list[int], chunk_tokens: int | None, num_pages: int, random: object
) -> None:
    pool = BlockPool(num_pages)
    scheduler = PrefillScheduler(pool, chunk_tokens)
    for arrival, size in enumerate(sizes):
        scheduler.add(job(arrival, size))
    first_seen: list[str] = []
    done = 0
    for _ in range(1000):
        chunks = scheduler.plan()
        assert chunks or not len(scheduler), "jobs wait and nothing runs"
        assert chunk_tokens is None or sum(chunk.length for chunk in chunks) <= chunk_tokens
        for chunk in chunks:
            if chunk.start == 0:
                first_seen.append(chunk.job.request.request_id)
            chunk.job.num_computed += chunk.length
        for finished in [job for job in scheduler if job.is_computed]:
            scheduler.remove(finished)
            done += 1
        pool.check()
        if not len(scheduler):
            break
    assert done == len(sizes)
    assert first_seen == [f"r{i}" for i in range(len(sizes))], "first come, first served"
    assert pool.num_free == num_pages


# Decode ----------------------------------------------------------------------------------------------


def running(scheduler: DecodeScheduler, request: RequestSpec, num_open_tickets: int = 0) -> DecodeSequence:
    scheduler.reserve(request)
    admitted = scheduler.admit(num_open_tickets)
    assert admitted is not None
    sequence = DecodeSequence(admitted[0], admitted[1], list(admitted[0].token_ids))
    scheduler.run(sequence)
    return sequence


def ids(sequences: Sequence[DecodeSequence]) -> list[str]:
    return [sequence.request.request_id for sequence in sequences]


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 129])
def test_admission_takes_the_blocks_of_the_tokens(num_tokens: int) -> None:
    pool = BlockPool(4)
    scheduler = DecodeScheduler(pool, 8)
    scheduler.reserve(spec(0, num_tokens))
    admitted = scheduler.admit(0)
    assert admitted is not None
    assert len(admitted[1]) == num_blocks(num_tokens)
    assert pool.num_free == 4 - num_blocks(num_tokens)
    assert scheduler.admit(0) is None


def test_alone_a_request_may_take_the_whole_pool() -> None:
    scheduler = DecodeScheduler(BlockPool(2), 8)
    scheduler.reserve(spec(0, 128))
    assert scheduler.admit(0) is not None


@pytest.mark.parametrize(
    ("num_running", "num_tickets", "admits"), [(0, 1, True), (0, 2, False), (1, 0, True), (1, 1, False)]
)
def test_each_sequence_and_ticket_keeps_a_block_to_grow_into(
    num_running: int, num_tickets: int, admits: bool
) -> None:
    scheduler = DecodeScheduler(BlockPool(2 + num_running), 8)
    for arrival in range(num_running):
        running(scheduler, spec(arrival, 1))
    scheduler.reserve(spec(9, 10))
    assert (scheduler.admit(num_tickets) is not None) is admits


def test_the_oldest_waits_first_and_holds_back_younger_ones() -> None:
    pool = BlockPool(4)
    scheduler = DecodeScheduler(pool, 8)
    first = running(scheduler, spec(0, 65))
    for request in (spec(7, 1), spec(3, 129), spec(5, 1)):
        scheduler.reserve(request)
    assert [r.arrival for r in scheduler.waiting] == [3, 5, 7]
    assert scheduler.admit(0) is None, "r5 fits, but would starve r3"
    scheduler.remove(first)
    admitted = scheduler.admit(0)
    assert admitted is not None
    assert admitted[0].arrival == 3


@pytest.mark.parametrize(
    ("num_tokens", "grows"), [(63, False), (64, False), (65, True), (128, False), (129, True)]
)
def test_a_sequence_grows_exactly_on_block_borders(num_tokens: int, grows: bool) -> None:
    pool = BlockPool(4)
    scheduler = DecodeScheduler(pool, 8)
    sequence = running(scheduler, spec(0, num_tokens - 1))
    before = pool.num_free
    sequence.token_ids.append(0)
    assert scheduler.plan() == ([sequence], [])
    assert before - pool.num_free == int(grows)
    assert scheduler.plan() == ([sequence], [])
    assert before - pool.num_free == int(grows), "planning twice takes nothing twice"


def test_the_youngest_yields_to_the_oldest_that_needs_a_block() -> None:
    pool = BlockPool(3)
    scheduler = DecodeScheduler(pool, 8)
    old, young = spec(0, 64), spec(1, 64)
    first, second = running(scheduler, old), running(scheduler, young)
    pool.allocate(1)
    first.token_ids.append(0)
    batch, preempted = scheduler.plan()
    assert (ids(batch), ids(preempted)) == (["r0"], ["r1"])
    assert scheduler.running == [first]
    assert second.block_ids, "the victim's blocks are listed still, but no longer its own"
    pool.check()


def test_the_youngest_sits_out_when_it_alone_finds_no_block() -> None:
    pool = BlockPool(2)
    scheduler = DecodeScheduler(pool, 8)
    first, second = running(scheduler, spec(0, 10)), None
    pool.release(pool.allocate(1))
    scheduler.reserve(spec(1, 64))
    second = DecodeSequence(scheduler.waiting.pop(), pool.allocate(1), list(range(65)))
    scheduler.run(second)
    batch, preempted = scheduler.plan()
    assert (ids(batch), preempted) == (["r0"], [])
    assert scheduler.running == [first, second]
    scheduler.remove(first)
    assert ids(scheduler.plan()[0]) == ["r1"]


def test_a_late_but_older_sequence_goes_ahead_and_is_not_the_victim() -> None:
    pool = BlockPool(3)
    scheduler = DecodeScheduler(pool, 8)
    young = running(scheduler, spec(5, 64))
    old = running(scheduler, spec(2, 64))
    assert ids(scheduler.running) == ["r2", "r5"]
    pool.allocate(1)
    old.token_ids.append(0)
    batch, preempted = scheduler.plan()
    assert (ids(batch), ids(preempted)) == (["r2"], ["r5"])
    assert young not in scheduler.running


def test_batch_is_limited_and_the_oldest_are_in_it() -> None:
    scheduler = DecodeScheduler(BlockPool(8), 2)
    for arrival in (3, 1, 2):
        running(scheduler, spec(arrival, 1))
    assert ids(scheduler.plan()[0]) == ["r1", "r2"]


def test_withdraw_finds_waiting_and_running_and_only_that_attempt() -> None:
    pool = BlockPool(4)
    scheduler = DecodeScheduler(pool, 8)
    sequence = running(scheduler, spec(0, 65))
    scheduler.reserve(spec(1, 1))
    assert scheduler.withdraw(RequestId("r0"), 2) is None
    assert scheduler.withdraw(RequestId("r1"), 1) is None
    assert scheduler.waiting == []
    assert scheduler.withdraw(RequestId("r0"), 1) is sequence
    assert scheduler.withdraw(RequestId("r0"), 1) is None
    assert pool.num_free == 4


EOS = frozenset({99})


@pytest.mark.parametrize(
    ("params", "output", "expected"),
    [
        ({}, [99], "stop"),
        ({"ignore_eos": True}, [99], None),
        ({"stop_token_ids": [7]}, [7], "stop"),
        ({"stop_token_ids": [7], "ignore_eos": True}, [7], "stop"),
        ({"min_tokens": 2}, [99], None),
        ({"min_tokens": 2}, [1, 99], "stop"),
        ({"min_tokens": 1}, [99], "stop"),
        ({}, [1, 2, 3], "length"),
        ({}, [1, 2, 99], "stop"),
        ({}, [1, 2], None),
    ],
)
def test_finish_reason(params: dict[str, object], output: list[int], expected: str | None) -> None:
    request = spec(0, 5, max_tokens=3, **params)
    sequence = DecodeSequence(request, [0], [*request.token_ids, *output])
    assert DecodeScheduler(BlockPool(1), 1).finish_reason(sequence, EOS) == expected


def test_finish_reason_counts_output_from_the_users_prompt_after_a_retry() -> None:
    retry = RequestSpec(
        request_id=RequestId("r"),
        attempt=2,
        arrival=0,
        token_ids=(1, 2, 3, 4),  # two of the prompt, two delivered before
        num_prompt_tokens=2,
        max_total_tokens=100,
        params=SamplingParams(max_tokens=3),
        seed=0,
    )
    sequence = DecodeSequence(retry, [0], [*retry.token_ids, 5])
    assert DecodeScheduler(BlockPool(1), 1).finish_reason(sequence, EOS) == "length"


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 140), st.integers(1, 140)), min_size=1, max_size=7),
    st.integers(0, 4),
    st.sampled_from([1, 2, 8]),
    st.randoms(use_true_random=False),
)
def test_every_request_produces_all_its_tokens_on_a_tiny_pool(
    sizes: list[tuple[int, int]], spare_blocks: int, max_num_seqs: int, random: object
) -> None:
    """Random hand-off delays; a preempted request comes back with its tokens so far."""
    pool = BlockPool(max(num_blocks(sum(size)) for size in sizes) + spare_blocks)
    start = pool.num_free
    scheduler = DecodeScheduler(pool, max_num_seqs)
    open_tickets: list[tuple[RequestSpec, list[int]]] = []
    done: dict[str, int] = {}
    for arrival, (num_tokens, max_tokens) in enumerate(sizes):
        scheduler.reserve(spec(arrival, num_tokens, max_tokens, ignore_eos=True))
    for _ in range(20_000):
        while (admitted := scheduler.admit(len(open_tickets))) is not None:
            open_tickets.append(admitted)
        for ticket in [t for t in open_tickets if random.random() < 0.6]:  # type: ignore[attr-defined]
            open_tickets.remove(ticket)
            scheduler.run(DecodeSequence(ticket[0], ticket[1], list(ticket[0].token_ids)))
        batch, preempted = scheduler.plan()
        assert len(set(map(id, batch))) == len(batch) <= max_num_seqs
        assert not set(map(id, batch)) & set(map(id, preempted))
        assert batch or open_tickets or scheduler.waiting or not scheduler.running, "all stand still"
        for sequence in batch:
            assert len(sequence.block_ids) * BLOCK_SIZE > sequence.num_cached, "nowhere to store the token"
            sequence.token_ids.append(0)
            if scheduler.finish_reason(sequence, EOS) is not None:
                request = sequence.request
                assert request.request_id not in done
                done[request.request_id] = len(sequence.token_ids) - request.num_prompt_tokens
                scheduler.remove(sequence)
        for victim in preempted:
            request = victim.request
            scheduler.reserve(
                RequestSpec(
                    request_id=request.request_id,
                    attempt=request.attempt + 1,
                    arrival=request.arrival,
                    token_ids=tuple(victim.token_ids),
                    num_prompt_tokens=request.num_prompt_tokens,
                    max_total_tokens=request.max_total_tokens,
                    params=request.params,
                    seed=0,
                )
            )
        pool.check()
        if len(done) == len(sizes):
            break
    assert done == {f"r{i}": max_tokens for i, (_, max_tokens) in enumerate(sizes)}
    assert pool.num_free == start
