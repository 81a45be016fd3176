"""Schedulers: who is admitted, who runs, who yields; and that nobody waits for ever."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.cache.pool import BlockPool
from kvrelay.cache.prefix import Prefixes
from kvrelay.sampling_params import SamplingParams
from kvrelay.scheduler.decode import Admission, DecodeScheduler, DecodeSequence
from kvrelay.scheduler.prefill import Chunk, PrefillJob, PrefillScheduler
from kvrelay.types import BLOCK_SIZE, RequestId, RequestSpec, TicketId, TransferTicket, WorkerId, num_blocks

PREFIXES = Prefixes("layout")


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


def job(
    arrival: int, num_tokens: int, local_blocks: list[int] | None = None, priority: int = 0, text: int = 0
) -> PrefillJob:
    """A job of `num_tokens` tokens to compute, one fewer than the request has; those of one text agree."""
    request = spec(arrival, num_tokens + 1, priority=priority, cache_salt=f"text {text}")
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
    return PrefillJob(request, ticket, is_local=local_blocks is not None, block_ids=local_blocks or [])


def lengths(scheduler: PrefillScheduler) -> list[tuple[str, int, int]]:
    return [(chunk.job.request.request_id, chunk.start, chunk.length) for chunk in scheduler.plan()[0]]


def compute(scheduler: PrefillScheduler) -> list[tuple[str, int, int]]:
    chunks, _ = scheduler.plan()
    for chunk in chunks:
        scheduler.advance(chunk)
    return [(chunk.job.request.request_id, chunk.start, chunk.length) for chunk in chunks]


# Prefill ---------------------------------------------------------------------------------------------


def test_chunks_are_cut_at_multiples_of_the_unit_whatever_else_is_in_the_step() -> None:
    scheduler = PrefillScheduler(BlockPool(40), 512, Prefixes(attention="sparse"))
    for arrival, num_tokens in enumerate((1, 70, 700, 900)):
        scheduler.add(job(arrival, num_tokens))
    starts = [start for _ in range(8) for _, start, _ in compute(scheduler)]
    assert sorted(set(starts)) == [0, 256, 512]
    assert all(chunked.is_computed for chunked in scheduler)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("chunk_tokens", [64, 128, None])
def test_chunks_cover_a_prompt_once_on_page_borders(num_tokens: int, chunk_tokens: int | None) -> None:
    pool = BlockPool(3)
    scheduler = PrefillScheduler(pool, chunk_tokens)
    scheduler.add(job(0, num_tokens))
    position, pages = 0, list[int]()
    while chunks := scheduler.plan()[0]:
        (chunk,) = chunks
        assert chunk.start == position
        assert chunk.start % BLOCK_SIZE == 0
        assert chunk_tokens is None or 0 < chunk.length <= chunk_tokens
        position += chunk.length
        pages += chunk.pages
        scheduler.advance(chunk)
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
    # 256 - 65 - 100 = 91: one page of the last
    assert compute(scheduler) == [("r0", 0, 65), ("r1", 0, 100), ("r2", 0, 64)]
    assert compute(scheduler) == [("r2", 64, 236)]
    assert compute(scheduler) == []


def test_a_cut_chunk_goes_on_where_it_stopped_before_younger_jobs() -> None:
    scheduler = PrefillScheduler(BlockPool(16), 128)
    scheduler.add(job(0, 200))
    scheduler.add(job(1, 10))
    assert compute(scheduler) == [("r0", 0, 64), ("r1", 0, 10)]
    assert compute(scheduler) == [("r0", 64, 128)]


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


def test_many_short_prompts_share_one_step() -> None:
    scheduler = PrefillScheduler(BlockPool(64), 512)
    for arrival in range(60):
        scheduler.add(job(arrival, 10))
    assert sum(length for _, _, length in compute(scheduler)) == 510, "512 tokens hold 51 prompts of 10"
    assert len(compute(scheduler)) == 9


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_delay_it_by_more_than_half() -> None:
    scheduler = PrefillScheduler(BlockPool(64), 256)
    scheduler.add(job(0, 1024))
    assert compute(scheduler) == [("r0", 0, 256)]
    scheduler.add(job(1, 60))
    assert sorted(compute(scheduler)) == [("r0", 256, 192), ("r1", 0, 60)]
    for arrival in range(2, 40):
        scheduler.add(job(arrival, 100))
    progress = [length for _ in range(4) for name, _, length in compute(scheduler) if name == "r0"]
    assert all(length >= 128 for length in progress)
    assert sum(progress) >= 4 * 128


def test_equally_long_prompts_go_first_come_first_served() -> None:
    scheduler = PrefillScheduler(BlockPool(64), 256)
    for arrival in range(3):
        scheduler.add(job(arrival, 512))
    order = [name for _ in range(6) for name, _, _ in compute(scheduler)]
    assert order == ["r0", "r0", "r1", "r1", "r2", "r2"]


def test_lower_priority_numbers_first_whenever_they_come() -> None:
    scheduler = PrefillScheduler(BlockPool(64), 256)
    scheduler.add(job(0, 512, priority=1))
    scheduler.add(job(1, 512, priority=0))
    scheduler.add(job(2, 512, priority=0))
    scheduler.add(job(3, 512, priority=-5))
    order = [name for _ in range(8) for name, _, _ in compute(scheduler)]
    assert order == ["r3", "r3", "r1", "r1", "r2", "r2", "r0", "r0"]


@pytest.mark.parametrize(("num_taken", "length"), [(0, 256), (16, 192), (64, 192), (250, 64), (9999, 64)])
def test_sequences_that_decode_take_their_part_of_the_budget(num_taken: int, length: int) -> None:
    scheduler = PrefillScheduler(BlockPool(64), 256)
    scheduler.add(job(0, 1024))
    chunks, _ = scheduler.plan(num_taken)
    assert [chunk.length for chunk in chunks] == [length], "one page at least, so that prefill goes on"


def test_one_that_holds_pages_goes_on_while_one_of_higher_priority_waits_for_pages() -> None:
    scheduler = PrefillScheduler(BlockPool(4), 64)
    scheduler.add(job(0, 200, priority=1))
    assert compute(scheduler) == [("r0", 0, 64)]
    scheduler.add(job(1, 200, priority=0))
    scheduler.add(job(2, 10, priority=0))
    steps = [compute(scheduler) for _ in range(3)]
    assert steps == [[("r0", 64, 64)], [("r0", 128, 64)], [("r0", 192, 8)]]
    assert compute(scheduler) == []
    scheduler.remove(next(iter(scheduler)))
    assert {name for name, _, _ in compute(scheduler)} <= {"r1", "r2"}


prefill_arrivals = st.lists(
    st.tuples(st.integers(1, 300), st.integers(0, 2), st.integers(0, 3), st.integers(0, 6)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=150, deadline=None)
@given(prefill_arrivals, st.sampled_from([64, 128, 256, None]), st.integers(5, 12), st.integers(0, 200))
def test_prefill_ends_for_any_mix(
    arrivals: list[tuple[int, int, int, int]], chunk_tokens: int | None, num_pages: int, num_taken: int
) -> None:
    """Jobs of (tokens, priority, which text they begin with, step they come in), with a prefix cache."""
    pool = BlockPool(num_pages)
    scheduler = PrefillScheduler(pool, chunk_tokens, PREFIXES)
    budget = None if chunk_tokens is None else max(64, chunk_tokens - num_taken)
    coming = {
        arrival: (step, job(arrival, size, priority=priority, text=text))
        for arrival, (size, priority, text, step) in enumerate(arrivals)
    }
    done: list[str] = []
    for step in range(1000):
        for arrival in [arrival for arrival, (due, _) in coming.items() if due <= step]:
            scheduler.add(coming.pop(arrival)[1])
        unfinished = sorted((job for job in scheduler), key=lambda job: job.request.rank)
        before = {job: job.num_computed for job in unfinished}
        chunks, begun = scheduler.plan(num_taken)
        assert chunks or begun or not len(scheduler), "jobs wait and nothing runs"
        assert budget is None or sum(chunk.length for chunk in chunks) <= budget
        for job_ in begun:
            assert before[job_] == 0
            assert job_.num_cached % BLOCK_SIZE == 0
        check_turns(unfinished, chunks, budget)
        for chunk in chunks:
            assert chunk.start == chunk.job.num_computed
            scheduler.advance(chunk)
        for finished in [job for job in scheduler if job.is_computed]:
            scheduler.remove(finished)
            done.append(finished.request.request_id)
        pool.check()
        if not len(scheduler) and not coming:
            break
    assert sorted(done) == sorted(f"r{i}" for i in range(len(arrivals)))
    assert pool.num_free == num_pages


def check_turns(jobs: list[PrefillJob], chunks: Sequence[Chunk], budget: int | None) -> None:
    """The first by rank is never left out once it has pages; nobody goes before a more urgent one."""
    given = {chunk.job: chunk.length for chunk in chunks}
    waiting = [job for job in jobs if not job.is_computed]
    if not waiting:
        return
    first = waiting[0]
    if first.is_begun:
        half = first.num_left if budget is None else max(64, budget // 2) // 64 * 64
        assert given[first] >= min(first.num_left, half)
    for job_ in given:
        for urgent in waiting:
            if urgent.request.params.priority < job_.request.params.priority and urgent.is_begun:
                left = urgent.num_left - given.get(urgent, 0)
                assert not left or given[job_] < 64 or job_ is first, "it had to wait for a more urgent one"


def test_what_one_prompt_computed_the_next_one_finds() -> None:
    pool = BlockPool(16)
    scheduler = PrefillScheduler(pool, 128, PREFIXES)
    scheduler.add(job(0, 200, text=1))
    scheduler.add(job(1, 200, text=1))
    scheduler.add(job(2, 200, text=2))
    steps = [compute(scheduler) for _ in range(7)]
    assert steps[:2] == [[("r0", 0, 128)], [("r0", 128, 72)]]
    assert steps[2] == [("r1", 192, 8), ("r2", 0, 64)], "three full blocks of r1 are there already"
    first, second, other = list(scheduler)
    assert second.block_ids[:3] == first.block_ids[:3]
    assert not set(other.block_ids) & set(first.block_ids)
    assert (first.num_cached, second.num_cached, other.num_cached) == (0, 192, 0)
    for each in (first, second, other):
        scheduler.remove(each)
    assert (pool.num_free, pool.num_cached) == (16, 6)


def test_a_prompt_that_is_cached_whole_begins_without_a_chunk() -> None:
    pool = BlockPool(8)
    scheduler = PrefillScheduler(pool, 64, PREFIXES)
    scheduler.add(job(0, 64, text=1))
    compute(scheduler)
    scheduler.add(job(1, 64, text=1))
    scheduler.add(job(2, 10))
    chunks, begun = scheduler.plan()
    assert [chunk.job.request.request_id for chunk in chunks] == ["r2"]
    assert [(job.request.request_id, job.is_computed) for job in begun] == [("r1", True), ("r2", False)]


def test_a_local_job_takes_over_blocks_that_were_filled_after_its_own_were_reserved() -> None:
    pool = BlockPool(8)
    scheduler = PrefillScheduler(pool, 192, PREFIXES)
    first, second = pool.allocate(3), pool.allocate(3)
    own = list(second)
    scheduler.add(job(0, 150, local_blocks=first, text=4))
    scheduler.add(job(1, 150, local_blocks=second, text=4))
    assert compute(scheduler) == [("r0", 0, 150)]
    assert compute(scheduler) == [("r1", 128, 22)]
    assert second == [*first[:2], own[2]], "the list is the ticket book's own: it frees what is in it now"
    assert pool.num_free == 4
    for blocks in (first, second):
        pool.release(blocks)
    pool.check()
    assert (pool.num_free, pool.num_cached) == (8, 2)


# Decode ----------------------------------------------------------------------------------------------


def running(scheduler: DecodeScheduler, request: RequestSpec, num_open_tickets: int = 0) -> DecodeSequence:
    scheduler.reserve(request)
    admitted = scheduler.admit(num_open_tickets)
    assert admitted is not None
    sequence = DecodeSequence(admitted.request, admitted.block_ids, list(request.token_ids))
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
    assert len(admitted.block_ids) == num_blocks(num_tokens)
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
    assert [waiting.request.arrival for waiting in scheduler.waiting] == [3, 5, 7]
    assert scheduler.admit(0) is None, "r5 fits, but would starve r3"
    scheduler.remove(first)
    admitted = scheduler.admit(0)
    assert admitted is not None
    assert admitted.request.arrival == 3


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
    second = DecodeSequence(scheduler.waiting.pop().request, pool.allocate(1), list(range(65)))
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
    open_tickets: list[Admission] = []
    done: dict[str, int] = {}
    for arrival, (num_tokens, max_tokens) in enumerate(sizes):
        scheduler.reserve(spec(arrival, num_tokens, max_tokens, ignore_eos=True))
    for _ in range(20_000):
        while (admitted := scheduler.admit(len(open_tickets))) is not None:
            open_tickets.append(admitted)
        for ticket in [t for t in open_tickets if random.random() < 0.6]:  # type: ignore[attr-defined]
            open_tickets.remove(ticket)
            scheduler.run(DecodeSequence(ticket.request, ticket.block_ids, list(ticket.request.token_ids)))
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
