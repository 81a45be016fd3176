"""What leaves first, and that all of it leaves once: `Relay` and `Arrivals` against any order of wishes."""

import tracemalloc
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvrelay.cache.arrivals import Arrivals
from kvrelay.sampling_params import SamplingParams
from kvrelay.scheduler.prefill import PrefillJob
from kvrelay.sparse import SparseAttention
from kvrelay.transport.base import Write, WriteDone
from kvrelay.types import KVLayout, RequestId, RequestSpec, TicketId, TransferTicket, WorkerId, num_blocks
from kvrelay.wire import Arrived
from kvrelay.worker.relay import TILES_PER_WRITE, Relay

LAYOUT = KVLayout(model="fake", dtype="float32", num_layers=3, num_kv_heads=2, head_dim=4)
PARTS = LAYOUT.num_parts
SPARSE = SparseAttention(
    budget_tokens=128, local_blocks=1, dense_layers=(0,), dense_below_tokens=0, candidate_tokens=0
)
STATISTICS_BYTES = 7


class Link:
    """A transport that completes the first write when told to; writes that were begun cannot be withdrawn."""

    def __init__(self) -> None:
        self.queue: list[Write] = []
        self.begun: Write | None = None

    def write(self, write: Write) -> None:
        place = len([each for each in self.queue if each.is_urgent]) if write.is_urgent else len(self.queue)
        self.queue.insert(place, write)

    def withdraw(self, write: Write) -> bool:
        if not any(each is write for each in self.queue):
            return False
        self.queue = [each for each in self.queue if each is not write]
        return True

    def begin(self) -> None:
        if self.begun is None and self.queue:
            self.begun = self.queue.pop(0)

    def finish(self) -> WriteDone | None:
        self.begin()
        write, self.begun = self.begun, None
        if write is None:
            return None
        if write.parts is None:
            size = len(write.source_blocks) * 2 * LAYOUT.page_bytes
        elif write.parts[0] == LAYOUT.statistics:
            size = len(write.parts) * STATISTICS_BYTES
        else:
            size = len(write.parts) * LAYOUT.page_bytes // LAYOUT.num_kv_heads
        return WriteDone(write, size, 1.0, 2.0)


def done(link: Link) -> WriteDone:
    """The write that is on the link, complete."""
    event = link.finish()
    assert event is not None
    return event


def job_of(num_tokens: int, num_cached: int) -> PrefillJob:
    """A job whose pages lie at 100, 101, … here and 500, … at decode, which has the first ones already."""
    request = RequestSpec(
        request_id=RequestId("r"),
        attempt=1,
        arrival=0,
        token_ids=tuple(range(num_tokens + 1)),
        num_prompt_tokens=num_tokens + 1,
        max_total_tokens=num_tokens + 9,
        params=SamplingParams(),
        seed=0,
    )
    count = num_blocks(num_tokens)
    ticket = TransferTicket(
        ticket_id=TicketId("t"),
        request_id=request.request_id,
        attempt=1,
        decode_worker=WorkerId("peer"),
        epoch=1,
        block_ids=tuple(range(500 + num_cached, 500 + count)),
        num_tokens=num_tokens,
        lease_s=8.0,
        num_cached_tokens=64 * num_cached,
    )
    return PrefillJob(request, ticket, False, list(range(100, 100 + count)), early=SPARSE)


def relay_over(link: Link) -> Relay:
    stand_in: Any = SimpleNamespace(
        store=SimpleNamespace(layout=LAYOUT),
        transport=link,
        runner=SimpleNamespace(copy_fence=lambda: None),
        config=SimpleNamespace(engine=SimpleNamespace(lease_s=8.0, verify_kv=False)),
    )
    return Relay(stand_in)


def written(events: list[WriteDone]) -> Counter[tuple[int, int, int, int]]:
    """How often each (layer, part, source block, target block) left."""
    found: Counter[tuple[int, int, int, int]] = Counter()
    for event in events:
        write = event.write
        parts = (
            [range(PARTS - 1)] * len(write.source_blocks)
            if write.parts is None
            else [[part] for part in write.parts]
        )
        for each, source, target in zip(parts, write.source_blocks, write.target_blocks, strict=True):
            found.update((write.layer, part, source, target) for part in each)
    return found


@settings(deadline=None)
@given(
    num_tokens=st.integers(64, 700),
    num_cached=st.integers(0, 3),
    prefix=st.integers(0, 6),
    dense_layers=st.sampled_from([(), (0,), (1, 2), (2,)]),
    data=st.data(),
)
def test_every_tile_leaves_once_whatever_is_wanted_when(
    num_tokens: int, num_cached: int, prefix: int, dense_layers: tuple[int, ...], data: st.DataObject
) -> None:
    link = Link()
    relay, job = relay_over(link), job_of(num_tokens, min(num_cached, num_tokens // 64))
    job.early = sparse = replace(SPARSE, dense_layers=dense_layers)
    count, first = num_blocks(num_tokens), job.first_page
    here = min(prefix, num_tokens // 64)
    arrivals = [
        Arrivals(job.ticket.ticket_id, LAYOUT.num_layers, range(first * PARTS, count * PARTS)) for _ in "ab"
    ]
    events, messages = list[WriteDone](), list[Arrived]()

    def tell() -> None:
        if job.outstanding and (message := relay.tell(job)) is not None:
            messages.append(message)

    def turn() -> None:
        """Anything may happen: a write begins, or ends, or some tiles are wanted at once."""
        for action in data.draw(st.lists(st.sampled_from(["begin", "finish", "want"]), max_size=4)):
            if action == "begin":
                link.begin()
            elif action == "want":
                tiles = data.draw(st.sets(st.integers(0, count * PARTS - 1), max_size=20))
                relay.hurry(job, {data.draw(st.integers(0, LAYOUT.num_layers - 1)): tiles})
            elif (event := link.finish()) is not None:
                events.append(event)
                relay.count(job, event)
                tell()

    relay.send_statistics(job, range(here))
    for pages, is_cached in ((range(here), True), (range(here, count), False)):
        for layer in range(LAYOUT.num_layers):
            relay.send(job, layer, pages)
            turn()
        job.num_computed = min(num_tokens, 64 * pages.stop) if pages.stop < count else num_tokens
        if not is_cached and job.outstanding:
            relay.send_statistics(job, pages)
        relay.hurry_forced(job, sparse, pages)
        turn()
    tell()
    while (event := link.finish()) is not None:
        turn()
        events.append(event)
        relay.count(job, event)
        tell()

    found = written(events)
    expected = {
        (layer, part, 100 + page, 500 + page)
        for layer in range(LAYOUT.num_layers)
        for part in range(PARTS - 1)
        for page in range(first, count)
    }
    assert {key: times for key, times in found.items() if key[1] < LAYOUT.statistics} == dict.fromkeys(
        expected, 1
    )
    assert all(times == 1 for times in found.values()), "statistics leave at most once"
    assert job.num_bytes_written == (count - first) * LAYOUT.block_bytes
    assert not job.outstanding
    assert [message.may_start for message in messages] == [True, *[False] * (len(messages) - 1)][
        : len(messages)
    ]
    for message in messages:
        for page in range(first, count) if message.may_start else ():
            tiles = {page * PARTS + part for part in range(PARTS - 1)}
            assert all(tiles.issubset(message.tiles[layer]) for layer in dense_layers), "decode reads all"
            statistics = page * PARTS + LAYOUT.statistics
            assert page == num_tokens // 64 or all(statistics in message.tiles[layer] for layer in range(3))
        assert arrivals[0].take(message.tiles), "told once"
    told = sum(message.num_bytes for message in messages) + job.num_untold_bytes
    assert told == sum(event.num_bytes for event in events)


def test_decode_may_start_with_what_it_surely_reads_and_what_was_foreseen() -> None:
    link = Link()
    relay, job = relay_over(link), job_of(640 + 20, 0)
    for layer in range(LAYOUT.num_layers):
        relay.send(job, layer, range(11))
    job.num_computed, job.foreseen = 660, {1: {4 * PARTS + 1, 4 * PARTS + 3}, 2: {7 * PARTS}}
    assert relay.tell(job) is None
    relay.send_statistics(job, range(11))
    relay.hurry_forced(job, SPARSE, range(11))
    relay.hurry(job, job.foreseen)
    message = None
    while message is None:
        relay.count(job, done(link))
        message = relay.tell(job)
    assert message.may_start
    statistics = {page * PARTS + LAYOUT.statistics for page in range(10)}
    whole = {page * PARTS + part for page in range(11) for part in range(PARTS - 1)}
    forced = {page * PARTS + part for page in (0, 10) for part in range(PARTS - 1)}
    assert set(message.tiles[0]) == statistics | whole, "a dense layer: all of it"
    assert set(message.tiles[1]) == statistics | forced | job.foreseen[1]
    assert set(message.tiles[2]) == statistics | forced | job.foreseen[2]
    assert all(len(write.source_blocks) <= TILES_PER_WRITE for write in link.queue)
    assert not any(write.is_urgent for write in link.queue)


@pytest.mark.parametrize(("dense_layers", "on_link"), [((2,), 3), ((), 4)])
def test_decode_does_not_start_while_what_it_reads_at_once_is_on_the_link(
    dense_layers: tuple[int, ...], on_link: int
) -> None:
    """A page of a dense layer, or the last one: its write had begun when others could become urgent."""
    link = Link()
    relay, job = relay_over(link), job_of(256 + 20, 3)
    job.early = sparse = replace(SPARSE, dense_layers=dense_layers)
    job.num_computed = 276
    relay.send_statistics(job, range(3, 5))
    for page in (7 - on_link, on_link):
        for layer in range(LAYOUT.num_layers):
            relay.send(job, layer, range(page, page + 1))
    while len(job.outstanding) > 1:
        relay.count(job, done(link))
    link.begin()
    relay.hurry_forced(job, sparse, range(3, 5))
    assert relay.tell(job) is None
    assert not any(posted.write.is_urgent for posted in job.outstanding.values())
    relay.count(job, done(link))
    message = relay.tell(job)
    assert message is not None
    assert message.may_start
    assert {on_link * PARTS + part for part in range(PARTS - 1)} <= set(message.tiles[2])


def test_what_is_hurried_and_what_is_left_are_few_writes() -> None:
    """However many of those that waited held a tile that is wanted."""
    link = Link()
    relay, job = relay_over(link), job_of(64 * 512, 0)
    for page in range(512):
        relay.send(job, 1, range(page, page + 1))
    wanted = {page * PARTS for page in range(0, 512, 2)}
    relay.hurry(job, {1: wanted})
    urgent = [write for write in link.queue if write.is_urgent]
    assert [len(write.source_blocks) for write in urgent] == [TILES_PER_WRITE] * 2
    assert len(link.queue) == 2 + 256 + 256 * 3 // TILES_PER_WRITE
    assert len(link.queue) == len(job.outstanding)


@pytest.mark.parametrize("arrived", [{0: (1,)}, {0: (3,)}, {0: (1, 3)}, {1: (1,)}, {}, {2: (1,)}, {-1: (1,)}])
def test_what_came_before_or_was_never_missing_changes_nothing(arrived: dict[int, tuple[int, ...]]) -> None:
    arrivals = Arrivals(TicketId("t"), 2, [1, 2])
    assert arrivals.take({0: (1,), 1: (2,)})
    arrivals.lacking = {0: {2}, 1: {1}}
    is_new = arrived in ({1: (1,)}, {})
    assert arrivals.take(arrived) is is_new
    assert arrivals.rest() == ({0: {2}} if arrived == {1: (1,)} else {0: {2}, 1: {1}})
    assert arrivals.lacking == ({0: {2}} if arrived == {1: (1,)} else {0: {2}, 1: {1}})
    assert arrivals.is_stalled
    assert arrivals.missing(0, [-1, 1, 2, 3]) == {2}
    assert arrivals.rest_of(0) == {2}
    assert arrivals.take(arrivals.rest())
    assert not arrivals.is_stalled
    assert arrivals.rest() == {}


def test_a_tile_on_its_way_takes_a_byte() -> None:
    """128K tokens of a Llama-8B: 2,048 blocks of 17 parts in 32 layers."""
    tracemalloc.start()
    arrivals = Arrivals(TicketId("t"), 32, range(2048 * 17))
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(arrivals.rest_of(31)) == 2048 * 17
    assert held_bytes < 1.1 * 32 * 2048 * 17
