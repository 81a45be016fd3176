"""The pure router under a virtual clock: delays, deaths, failures, preemptions, aborts, stale messages.

Workers are small fakes that keep real tickets in a real `TicketBook` over a real pool, so that what the
router says about writers decides whether blocks come home.
"""

import heapq
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.cache.pool import BlockPool
from kvrelay.cache.prefix import block_hashes
from kvrelay.cache.tickets import TicketBook
from kvrelay.errors import (
    InvalidRequest,
    KVRelayError,
    NoWorker,
    PoolTooSmall,
    TransferFailed,
    UnknownName,
    WorkerFailed,
)
from kvrelay.router.core import MAX_FAILURES, Router
from kvrelay.router.load import Job, Load, Pair
from kvrelay.router.policies import POLICIES, Auto, open_policy
from kvrelay.router.request import RoutedRequest, Update
from kvrelay.sampling_params import SamplingParams
from kvrelay.types import RequestId, RequestSpec, Role, TicketId, TransferTicket, WorkerId, num_blocks
from kvrelay.wire import (
    Abort,
    AttemptFailed,
    Mark,
    Message,
    NewToken,
    Preempted,
    Prefill,
    Reserve,
    Reserved,
    StepReport,
    WriterGone,
)
from tiny_engine import hello

POOL_BLOCKS = 64  # as `hello` says


def request(number: int, num_prompt_tokens: int = 3, max_tokens: int = 4) -> RoutedRequest:
    return RoutedRequest(
        request_id=RequestId(f"r{number}"),
        arrival=number,
        params=SamplingParams(max_tokens=max_tokens),
        seed=number,
        token_ids=list(range(num_prompt_tokens)),
        num_prompt_tokens=num_prompt_tokens,
        max_total_tokens=num_prompt_tokens + max_tokens,
    )


# Step by step -------------------------------------------------------------------------------------------


@dataclass
class Desk:
    """A router whose letters are kept: what it said to whom, and what owners were told."""

    sent: list[tuple[str, Message]] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    router: Router = field(init=False)

    def __post_init__(self) -> None:
        self.router = Router(
            open_policy("least_loaded"), lambda to, what: self.sent.append((to, what)), self.updates.append
        )

    def taken(self) -> list[tuple[str, Message]]:
        taken, self.sent = self.sent, []
        return taken

    def says(self, message: Message, now_s: float = 1.0) -> list[tuple[str, Message]]:
        self.router.on_message(message, now_s)
        return self.taken()

    def loads(self) -> list[tuple[int, int]]:
        return [(load.num_prefill_tokens, load.num_requests) for load in self.router.fleet.loads.values()]


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    for worker_id, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode")):
        desk.router.fleet.add(hello(worker_id, role))  # type: ignore[arg-type]
    return desk


def reserved(spec: RequestSpec, decode: str = "d0") -> Reserved:
    ticket = TransferTicket(
        ticket_id=TicketId(f"{decode}/{spec.request_id}/{spec.attempt}"),
        request_id=spec.request_id,
        attempt=spec.attempt,
        decode_worker=WorkerId(decode),
        epoch=1,
        block_ids=(0,),
        num_tokens=spec.num_prefill_tokens,
        lease_s=1.0,
    )
    return Reserved(request_id=spec.request_id, attempt=spec.attempt, ticket=ticket, at_s=1.0)


def mark(attempt: int, event: str, at_s: float = 1.0, number: int = 0) -> Mark:
    return Mark(request_id=RequestId(f"r{number}"), attempt=attempt, event=event, at_s=at_s)


def token(token_id: int, attempt: int = 1, end: bool = False, worker: str = "d0") -> StepReport:
    new = NewToken(
        request_id=RequestId("r0"),
        attempt=attempt,
        token_id=token_id,
        finish_reason="length" if end else None,
    )
    return StepReport(
        worker_id=WorkerId(worker),
        phase="decode",
        start_s=1.0,
        end_s=2.0,
        cpu_s=0.0,
        num_tokens={"r0": 1},
        tokens=(new,),
    )


def committed(desk: Desk) -> RequestSpec:
    """A request on p0 and d0 whose KV has been committed."""
    desk.router.submit(request(0), 0.0)
    ((_, reserve),) = desk.taken()
    assert isinstance(reserve, Reserve)
    desk.says(reserved(reserve.request))
    for event in ("prefill_started", "prefill_finished", "kv_committed"):
        desk.says(mark(1, event))
    return reserve.request


def test_the_way_of_a_request(desk: Desk) -> None:
    desk.router.submit(request(0), 0.0)
    ((to, reserve),) = desk.taken()
    assert to == "d0"
    assert isinstance(reserve, Reserve)
    answer = reserved(reserve.request)
    assert desk.says(answer) == [("p0", Prefill(request=reserve.request, ticket=answer.ticket))]  # type: ignore[arg-type]
    assert desk.loads() == [(3, 0), (0, 0), (0, 1), (0, 0)]
    assert desk.says(mark(1, "prefill_finished")) == []
    assert desk.loads() == [(0, 0), (0, 0), (0, 1), (0, 0)]
    assert desk.says(mark(1, "kv_committed")) == []
    desk.says(token(7))
    desk.says(token(8, end=True))
    assert [(u.token_id, u.finish_reason) for u in desk.updates] == [(7, None), (8, "length")]
    assert desk.loads() == [(0, 0)] * 4
    assert desk.router.requests == {}
    assert not desk.router._writers


@pytest.mark.parametrize("has_come", [False, True])
def test_a_request_that_ends_before_its_kv_has_come_stops_the_writer(desk: Desk, has_come: bool) -> None:
    """It ran on a part; what has not left is of no more use. Once all has come nobody writes."""
    desk.router.submit(request(0), 0.0)
    ((_, reserve),) = desk.taken()
    assert isinstance(reserve, Reserve)
    answer = reserved(reserve.request)
    desk.says(answer)
    for event in ("prefill_finished", "kv_usable", *(["kv_committed"] if has_come else [])):
        desk.says(mark(1, event))
    abort = Abort(request_id=RequestId("r0"), attempt=1)
    with_ticket = Abort(request_id=RequestId("r0"), attempt=1, ticket=answer.ticket)
    assert desk.says(token(7, end=True)) == ([] if has_come else [("d0", abort), ("p0", with_ticket)])
    assert [update.finish_reason for update in desk.updates] == ["length"]


def test_the_newest_requests_token_of_a_step_is_passed_on_first(desk: Desk) -> None:
    for number in (0, 1):
        desk.router.submit(request(number), 0.0)
    step = token(7)
    both = (*step.tokens, msgspec.structs.replace(step.tokens[0], request_id=RequestId("r1")))
    desk.says(msgspec.structs.replace(step, num_tokens={"r0": 1, "r1": 1}, tokens=both))
    assert [update.request_id for update in desk.updates] == ["r1", "r0"]


def test_progress_is_that_of_the_attempt_that_goes_on(desk: Desk) -> None:
    """What is known of the last one is forgotten with it, and what is still said of it tells nobody."""
    asked = request(0, num_prompt_tokens=700)
    desk.router.submit(asked, 0.0)
    ((_, reserve),) = desk.taken()
    assert isinstance(reserve, Reserve)
    desk.says(reserved(reserve.request))
    step = msgspec.structs.replace(token(7), worker_id=WorkerId("p0"), phase="prefill", tokens=())
    desk.says(msgspec.structs.replace(step, unfinished={"r0": 512}))
    assert asked.num_prefilled == 512
    desk.router.on_worker_dead(WorkerId("p0"), "killed", 2.0)
    assert (asked.prefill, asked.num_prefilled) == ("p1", 0)
    desk.says(msgspec.structs.replace(step, unfinished={"r0": 640}))
    assert asked.num_prefilled == 0
    desk.says(msgspec.structs.replace(step, worker_id=WorkerId("p1"), unfinished={"r0": 704}))
    assert [update.num_prefilled for update in desk.updates] == [512, 700], "never more than the prompt"


def test_a_one_token_prompt_never_troubles_prefill(desk: Desk) -> None:
    desk.router.submit(request(0, num_prompt_tokens=1), 0.0)
    desk.taken()
    assert desk.says(Reserved(request_id=RequestId("r0"), attempt=1, ticket=None, at_s=1.0)) == []
    desk.says(mark(1, "kv_committed"))
    assert desk.loads() == [(0, 0), (0, 0), (0, 1), (0, 0)]


def test_abort_before_the_ticket_frees_the_ticket_that_comes_late(desk: Desk) -> None:
    desk.router.submit(request(0), 0.0)
    ((_, reserve),) = desk.taken()
    assert isinstance(reserve, Reserve)
    desk.router.finish(RequestId("r0"), "abort", 1.0)
    assert desk.taken() == [("d0", Abort(request_id=RequestId("r0"), attempt=1))]
    late = reserved(reserve.request)
    assert late.ticket is not None
    gone = WriterGone(ticket_id=late.ticket.ticket_id, decode_worker=WorkerId("d0"))
    assert desk.says(late) == [("d0", gone)]
    assert [u.finish_reason for u in desk.updates] == ["abort"]


def test_abort_while_filling_stops_both_sides_and_passes_the_writers_end_on(desk: Desk) -> None:
    desk.router.submit(request(0), 0.0)
    ((_, reserve),) = desk.taken()
    assert isinstance(reserve, Reserve)
    answer = reserved(reserve.request)
    assert answer.ticket is not None
    desk.says(answer)
    desk.router.finish(RequestId("r0"), "abort", 1.0)
    abort = Abort(request_id=RequestId("r0"), attempt=1)
    with_ticket = Abort(request_id=RequestId("r0"), attempt=1, ticket=answer.ticket)
    assert desk.taken() == [("d0", abort), ("p0", with_ticket)]
    gone = WriterGone(ticket_id=answer.ticket.ticket_id, decode_worker=WorkerId("d0"))
    assert desk.says(gone) == [("d0", gone)]


def test_a_writer_that_owes_its_end_is_watched_though_no_request_waits_for_it(desk: Desk) -> None:
    """A prefill worker that hangs after an abort holds decode's blocks: its silence must be noticed."""
    desk.router.submit(request(0), 0.0)
    ((_, reserve),) = desk.taken()
    assert isinstance(reserve, Reserve)
    answer = reserved(reserve.request)
    desk.says(answer)
    desk.router.finish(RequestId("r0"), "abort", 1.0)
    assert desk.router.has_work(WorkerId("p0"))
    assert answer.ticket is not None
    desk.says(WriterGone(ticket_id=answer.ticket.ticket_id, decode_worker=WorkerId("d0")))
    assert not desk.router.has_work(WorkerId("p0"))


def test_finish_is_idempotent_and_aborts_after_the_end_change_nothing(desk: Desk) -> None:
    committed(desk)
    desk.says(token(7, end=True))
    desk.router.finish(RequestId("r0"), "abort", 2.0)
    desk.router.fail(RequestId("r0"), KVRelayError("x"), 2.0)
    desk.router.on_worker_dead(WorkerId("d0"), "x", 3.0)
    assert len(desk.updates) == 1
    assert desk.loads() == [(0, 0)] * 4


def test_a_decode_death_keeps_delivered_tokens_and_a_prefill_death_after_commit_harms_nothing(
    desk: Desk,
) -> None:
    spec = committed(desk)
    desk.says(token(7))
    desk.router.on_worker_dead(WorkerId("p0"), "killed", 2.0)
    assert desk.taken() == []
    desk.router.on_worker_dead(WorkerId("d0"), "killed", 3.0)
    ((to, retry),) = desk.taken()
    assert to == "d1"
    assert isinstance(retry, Reserve)
    assert retry.request.token_ids == (*spec.token_ids, 7)
    assert (retry.request.attempt, retry.request.num_prompt_tokens) == (2, 3)
    assert (retry.request.arrival, retry.request.seed) == (spec.arrival, spec.seed)
    assert desk.says(token(9, attempt=1)) == []
    assert [u.token_id for u in desk.updates] == [7], "a token of the dead attempt is not delivered"


def test_preemption_requeues_with_the_tokens_so_far_and_is_no_failure(desk: Desk) -> None:
    committed(desk)
    desk.says(token(7))
    for attempt in range(1, 2 * MAX_FAILURES):
        ((_, retry),) = desk.says(Preempted(request_id=RequestId("r0"), attempt=attempt))
        assert isinstance(retry, Reserve)
        assert retry.request.token_ids == (0, 1, 2, 7)
    assert desk.says(Preempted(request_id=RequestId("r0"), attempt=1)) == [], "stale"
    assert len(desk.updates) == 1


@pytest.mark.parametrize("retryable", [True, False])
def test_a_failed_attempt_is_retried_a_bounded_number_of_times(desk: Desk, retryable: bool) -> None:
    desk.router.submit(request(0), 0.0)
    for attempt in range(1, MAX_FAILURES + 2):
        failed = AttemptFailed(
            request_id=RequestId("r0"),
            attempt=attempt,
            error="TransferFailed",
            message="digest",
            retryable=retryable,
        )
        desk.says(failed)
    (update,) = desk.updates
    assert isinstance(update.error, TransferFailed)
    assert "digest" in str(update.error)
    assert desk.router.counts.num_ended["retried"] == (MAX_FAILURES if retryable else 0)
    assert desk.loads() == [(0, 0)] * 4


def test_an_unknown_error_name_still_ends_the_request(desk: Desk) -> None:
    desk.router.submit(request(0), 0.0)
    desk.says(
        AttemptFailed(request_id=RequestId("r0"), attempt=1, error="Boom", message="x", retryable=False)
    )
    assert isinstance(desk.updates[0].error, KVRelayError)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_without_workers_of_a_role_requests_end_with_the_reason(desk: Desk, role: str) -> None:
    desk.router.submit(request(0), 0.0)
    for worker_id in (f"{role[0]}0", f"{role[0]}1"):
        desk.router.on_worker_dead(WorkerId(worker_id), "killed by signal 9", 1.0)
    desk.router.submit(request(1), 2.0)
    assert [type(u.error) for u in desk.updates] == [NoWorker, NoWorker]
    assert "killed by signal 9" in str(desk.updates[0].error)
    assert f"no {role} worker is alive" in str(desk.updates[1].error)
    assert desk.loads() == [(0, 0)] * 4


def test_a_request_that_fits_no_pool_is_refused_with_the_numbers(desk: Desk) -> None:
    desk.router.fleet.check_fits(1, POOL_BLOCKS * 64)
    with pytest.raises(PoolTooSmall, match=r"need 65 KV blocks.*has 64") as caught:
        desk.router.fleet.check_fits(1, POOL_BLOCKS * 64 + 1)
    assert isinstance(caught.value, InvalidRequest)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("small", ["prefill", "decode"])
def test_a_request_only_goes_where_it_fits(policy: str, small: str) -> None:
    """Pools are sized from the memory each worker finds, so they differ: on a small one it waits for ever."""
    sent: list[tuple[str, Message]] = []
    router = Router(open_policy(policy), lambda to, what: sent.append((to, what)), lambda update: None)
    for role in ("prefill", "decode"):
        router.fleet.add(hello(f"{role}-0", role, 1 if role == small else 8))  # type: ignore[arg-type]
        router.fleet.add(hello(f"{role}-1", role, 8))  # type: ignore[arg-type]
    router.fleet.check_fits(100, 104)
    for number in range(4):
        router.submit(request(number, 100), 0.0)
    assert all(r.prefill != f"{small}-0" and r.decode != f"{small}-0" for r in router.requests.values())


@pytest.mark.parametrize("small", ["prefill", "decode"])
def test_a_retry_that_fits_no_living_pool_ends_with_an_error(small: str) -> None:
    updates: list[Update] = []
    router = Router(open_policy("least_loaded"), lambda to, what: None, updates.append)
    for role in ("prefill", "decode"):
        router.fleet.add(hello(f"{role}-0", role))  # type: ignore[arg-type]
        router.fleet.add(hello(f"{role}-1", role, 1 if role == small else 8))  # type: ignore[arg-type]
    router.submit(request(0, 100), 0.0)
    router.on_worker_dead(WorkerId(f"{small}-0"), "killed", 1.0)
    assert [type(update.error) for update in updates] in ([PoolTooSmall], [WorkerFailed])


def test_an_owner_may_end_other_requests_from_its_own_update() -> None:
    updates: list[Update] = []
    router = Router(open_policy("least_loaded"), lambda to, what: None, lambda update: on_update(update))

    def on_update(update: Update) -> None:
        updates.append(update)
        for other in list(router.requests):
            router.finish(other, "abort", update.at_s)

    router.fleet.add(hello("p0", "prefill"))
    router.fleet.add(hello("d0", "decode"))
    for number in range(3):
        router.submit(request(number), 0.0)
    router.on_worker_dead(WorkerId("d0"), "killed", 1.0)
    assert Counter(update.request_id for update in updates) == {"r0": 1, "r1": 1, "r2": 1}


# Policies -----------------------------------------------------------------------------------------------


def loads(*numbers: tuple[int, int]) -> list[Load]:
    return [Load(WorkerId(f"w{i}"), *both) for i, both in enumerate(numbers)]


def pairs_of(prefills: list[Load], decodes: list[Load]) -> list[Pair]:
    return [Pair(prefill, decode) for decode in decodes for prefill in prefills]


def names(pair: Pair) -> tuple[str, str]:
    return (pair.prefill.worker_id, pair.decode.worker_id)


JOB = Job(num_tokens=100, max_new_tokens=10)


def test_round_robin_takes_each_in_turn_phase_by_phase() -> None:
    policy = open_policy("round_robin")
    prefills = [Load(WorkerId("p0"), 9, 0), Load(WorkerId("p1"))]
    decodes = [Load(WorkerId("d0"), 0, 9), Load(WorkerId("d1"))]
    chosen = [names(policy.choose(JOB, pairs_of(prefills, decodes))) for _ in range(4)]
    assert chosen == [("p0", "d0"), ("p1", "d1"), ("p0", "d0"), ("p1", "d1")]


def test_least_loaded_looks_at_the_phases_own_load() -> None:
    policy = open_policy("least_loaded")
    assert names(policy.choose(JOB, pairs_of(loads((5, 0), (4, 9)), loads((5, 0), (4, 9))))) == ("w1", "w0")
    assert names(policy.choose(JOB, pairs_of(loads((0, 0)), loads((0, 1), (0, 1))))) == ("w0", "w0")


def test_prefix_aware_weighs_the_queue_against_what_is_cached() -> None:
    policy = open_policy("prefix_aware")
    job = Job(num_tokens=300, block_hashes=(b"a", b"b", b"c", b"d"))
    cold, warm = Load(WorkerId("cold")), Load(WorkerId("warm"), cached={b"a", b"b", b"c"})
    decode = Load(WorkerId("d"))
    both = pairs_of([cold, warm], [decode])
    assert names(policy.choose(job, both)) == ("warm", "d")
    warm.num_prefill_tokens = 200  # 192 tokens are cached there
    assert names(policy.choose(job, both)) == ("cold", "d")
    warm.num_prefill_tokens = 100
    assert names(policy.choose(job, both)) == ("warm", "d")
    warm.cached = {b"b", b"c"}  # without the first block, the others are of no use
    assert names(policy.choose(job, both)) == ("cold", "d")


def test_prefix_aware_takes_the_decode_worker_that_has_the_prompt_among_equals() -> None:
    job = Job(num_tokens=100, block_hashes=(b"a",))
    decodes = [Load(WorkerId("d0")), Load(WorkerId("d1"), cached={b"a"})]
    pairs = pairs_of([Load(WorkerId("p"))], decodes)
    assert names(open_policy("prefix_aware").choose(job, pairs)) == ("p", "d1")
    decodes[1].num_requests = 1
    assert names(open_policy("prefix_aware").choose(job, pairs)) == ("p", "d0")


def test_auto_says_which_it_took() -> None:
    policy = open_policy("auto")
    assert isinstance(policy, Auto)
    plain = [Pair(load, load) for load in loads((0, 0), (0, 0))]
    policy.choose(JOB, plain)
    policy.choose(Job(num_tokens=100, slo_ttft_s=1.0), plain)
    assert policy.taken == {"energy_aware": 0, "prefix_aware": 0, "least_loaded": 2}
    plain[1].prefill.cached = {b"a"}
    cached = Job(num_tokens=100, block_hashes=(b"a",), slo_ttft_s=1.0)
    assert policy.choose(cached, plain) is plain[1]
    assert policy.taken["prefix_aware"] == 1
    for pair in plain:
        pair.prefill.add_prefill(100, 0.1)
        pair.decode.decode_speed.add(1, 0.01)
        pair.prefill.watts = {"prefill": 5.0, "decode": 5.0}
    policy.choose(cached, plain)
    assert policy.taken["energy_aware"] == 1
    policy.choose(Job(num_tokens=100), plain)
    assert policy.taken == {"energy_aware": 1, "prefix_aware": 1, "least_loaded": 3}, "no SLO, no trade"


def test_blocks_that_decode_has_cached_are_not_counted_again() -> None:
    router = Router(open_policy("least_loaded"), lambda to, what: None, lambda update: None)
    router.fleet.add(hello("p0", "prefill"))
    router.fleet.add(hello("d0", "decode", 8))
    load = router.fleet.loads[WorkerId("d0")]
    layout = router.workers[WorkerId("d0")].hello.descriptor.layout
    load.change_cached(block_hashes(request(0, 300).token_ids, layout.fingerprint()), [])
    for number in range(3):
        router.submit(request(number, 300), 0.0)
    assert load.num_used_blocks == 3, "four of the five blocks of each are the same"
    assert [routed.decode for routed in router.requests.values()] == ["d0"] * 3, (
        "the pool holds two whole ones"
    )
    for number in range(3):
        router.finish(RequestId(f"r{number}"), "abort", 1.0)
    assert load.num_used_blocks == 0


def test_an_unknown_policy_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UnknownName, match="least_loaded, prefix_aware, round_robin"):
        open_policy("fastest")


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_chooses_one_of_the_pairs(name: str) -> None:
    policy = open_policy(name)
    job = Job(num_tokens=100, max_new_tokens=10, block_hashes=(b"a", b"b"), slo_ttft_s=1.0, slo_itl_s=0.1)
    for size in (3, 1, 2, 3):
        workers = loads(*((i, i) for i in range(size)))
        workers[0].cached = {b"a"}
        workers[-1].watts = {"prefill": 5.0, "decode": 5.0}
        workers[-1].add_prefill(100, 0.5)
        workers[-1].decode_speed.add(1, 0.01)
        for pairs in (pairs_of(workers, workers), [Pair(load, load) for load in workers]):
            assert policy.choose(job, pairs) in pairs


# The simulation -----------------------------------------------------------------------------------------


@dataclass
class FakeJob:
    prefill: Prefill
    is_open: bool = True


class Network:
    """Events in virtual time. Each pair of ends keeps its order; different pairs overtake each other."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.now_s = chance, 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._last: defaultdict[tuple[str, str], float] = defaultdict(float)

    def later(self, function: Callable[[], None], at_s: float | None = None) -> None:
        at_s = self.now_s + self.chance.expovariate(1.0) if at_s is None else at_s
        heapq.heappush(self._queue, (at_s, next(self._numbers), function))

    def send(self, sender: str, receiver: str, function: Callable[[], None]) -> None:
        at_s = max(self.now_s + self.chance.expovariate(1.0), self._last[sender, receiver])
        self._last[sender, receiver] = at_s
        self.later(function, at_s)

    def run(self, max_events: int = 60_000) -> None:
        for _ in range(max_events):
            if not self._queue:
                return
            self.now_s, _, function = heapq.heappop(self._queue)
            function()
        raise AssertionError("the simulation does not come to rest")


class FakeWorker:
    """Prefill and decode sides as the worker package promises them, without tensors."""

    def __init__(self, world: "World", worker_id: str, role: Role) -> None:
        self.world, self.worker_id, self.is_alive = world, WorkerId(worker_id), True
        self.pool = BlockPool(POOL_BLOCKS)
        self.book = TicketBook(self.pool, self.worker_id, 1, lease_s=1e9)
        self.jobs: dict[TicketId, FakeJob] = {}
        self.reserved: dict[TicketId, RequestSpec] = {}
        self.running: dict[tuple[str, int], tuple[RequestSpec, list[int], list[int]]] = {}
        world.router.fleet.add(hello(worker_id, role))

    def say(self, message: Message) -> None:
        world = self.world
        world.network.send(
            self.worker_id, "router", lambda: world.router.on_message(message, world.network.now_s)
        )

    def on(self, message: Message) -> None:
        if not self.is_alive:
            return
        match message:
            case Reserve():
                self.reserve(message.request)
            case Prefill():
                self.jobs[message.ticket.ticket_id] = FakeJob(message)
                self.world.network.later(lambda: self.prefill(message.ticket))
            case Abort() if message.ticket is not None:
                self.jobs.pop(message.ticket.ticket_id, None)
                self.gone(message.ticket)
            case Abort():
                self.abort(message)
            case WriterGone():
                self.world.gone[message.ticket_id] += 1
                self.reserved.pop(message.ticket_id, None)
                self.book.writer_gone(message.ticket_id)

    def gone(self, ticket: TransferTicket) -> None:
        self.say(WriterGone(ticket_id=ticket.ticket_id, decode_worker=ticket.decode_worker))

    def reserve(self, spec: RequestSpec) -> None:
        needed = num_blocks(len(spec.token_ids))
        assert self.pool.can_allocate(needed), "the simulation's pools are large enough: a leak"
        blocks = self.pool.allocate(needed)
        if spec.num_prefill_tokens == 0:
            self.say(Reserved(request_id=spec.request_id, attempt=spec.attempt, ticket=None, at_s=self.now_s))
            self.start(spec, blocks)
            return
        ticket = self.book.mint(spec, blocks, self.now_s)
        self.reserved[ticket.ticket_id] = spec
        self.world.minted[ticket.ticket_id] = self
        self.say(Reserved(request_id=spec.request_id, attempt=spec.attempt, ticket=ticket, at_s=self.now_s))

    def prefill(self, ticket: TransferTicket) -> None:
        job = self.jobs.get(ticket.ticket_id)
        if job is None or not self.is_alive:
            return
        self.mark(job.prefill.request, "prefill_started")
        if self.world.happens("prefill_fails"):
            del self.jobs[ticket.ticket_id]
            self.failed(job.prefill.request, "writing failed")
            self.gone(ticket)
            return
        self.mark(job.prefill.request, "prefill_finished")
        del self.jobs[ticket.ticket_id]
        decode = self.world.workers[ticket.decode_worker]
        if not self.world.happens("filled_lost"):
            self.world.network.send(self.worker_id, decode.worker_id, lambda: decode.filled(ticket))
        else:
            self.world.network.later(lambda: decode.expire(ticket))

    def filled(self, ticket: TransferTicket) -> None:
        spec = self.reserved.pop(ticket.ticket_id, None) if self.is_alive else None
        if spec is None:
            return
        if self.world.happens("kv_damaged"):
            self.book.abort(ticket.request_id, ticket.attempt)
            self.book.writer_gone(ticket.ticket_id)
            self.world.ended[ticket.ticket_id] += 1
            self.failed(spec, "digests differ")
            return
        blocks = self.book.commit(ticket.ticket_id)
        assert blocks is not None
        self.world.ended[ticket.ticket_id] += 1
        self.start(spec, blocks)

    def expire(self, ticket: TransferTicket) -> None:
        spec = self.reserved.pop(ticket.ticket_id, None) if self.is_alive else None
        if spec is not None:
            self.book.abort(ticket.request_id, ticket.attempt)
            self.failed(spec, "silent")

    def start(self, spec: RequestSpec, blocks: list[int]) -> None:
        key = (spec.request_id, spec.attempt)
        self.running[key] = (spec, blocks, list(spec.token_ids))
        self.mark(spec, "kv_committed")
        self.world.network.later(lambda: self.step(key))

    def step(self, key: tuple[str, int]) -> None:
        if key not in self.running or not self.is_alive:
            return
        spec, blocks, tokens = self.running[key]
        if len(tokens) == len(spec.token_ids):
            self.mark(spec, "decode_started")
        if self.world.happens("preempted"):
            del self.running[key]
            self.pool.release(blocks)
            self.say(Preempted(request_id=spec.request_id, attempt=spec.attempt))
            return
        tokens.append(next_token(spec.seed, len(tokens)))
        is_last = len(tokens) >= spec.max_total_tokens
        new = NewToken(
            request_id=spec.request_id,
            attempt=spec.attempt,
            token_id=tokens[-1],
            finish_reason="length" if is_last else None,
        )
        self.say(
            StepReport(
                worker_id=self.worker_id,
                phase="decode",
                start_s=self.now_s,
                end_s=self.now_s,
                cpu_s=0.0,
                num_tokens={spec.request_id: 1},
                tokens=(new,),
            )
        )
        if is_last:
            del self.running[key]
            self.pool.release(blocks)
        else:
            self.world.network.later(lambda: self.step(key))

    def abort(self, message: Abort) -> None:
        running = self.running.pop((message.request_id, message.attempt), None)
        if running is not None:
            self.pool.release(running[1])
        ticket_id = self.book.abort(message.request_id, message.attempt)
        if ticket_id is not None:
            self.reserved.pop(ticket_id, None)

    def mark(self, spec: RequestSpec, event: str) -> None:
        self.say(mark_of(spec, event, self.now_s))

    def failed(self, spec: RequestSpec, why: str) -> None:
        self.say(
            AttemptFailed(
                request_id=spec.request_id,
                attempt=spec.attempt,
                error="TransferFailed",
                message=why,
                retryable=True,
            )
        )

    @property
    def now_s(self) -> float:
        return self.world.network.now_s


def mark_of(spec: RequestSpec, event: str, at_s: float) -> Mark:
    return Mark(request_id=spec.request_id, attempt=spec.attempt, event=event, at_s=at_s)


def next_token(seed: int, position: int) -> int:
    """Contract 1 in the small: a token depends on the seed and its position only."""
    return 1000 + seed * 100 + position


class World:
    """A router and its fake workers; chances of trouble from one seed."""

    def __init__(self, seed: int, num_prefill: int, num_decode: int, policy: str, trouble: float) -> None:
        self.chance = random.Random(seed)
        self.network = Network(self.chance)
        self.trouble = trouble
        self.updates: defaultdict[str, list[Update]] = defaultdict(list)
        self.minted: dict[TicketId, FakeWorker] = {}
        self.ended: Counter[TicketId] = Counter()
        self.gone: Counter[TicketId] = Counter()
        self.router = Router(
            open_policy(policy), self.deliver_to_worker, lambda u: self.updates[u.request_id].append(u)
        )
        self.workers: dict[WorkerId, FakeWorker] = {}
        roles: list[tuple[str, Role]] = [(f"p{i}", "prefill") for i in range(num_prefill)]
        roles += [(f"d{i}", "decode") for i in range(num_decode)]
        if not num_prefill:
            roles = [(f"c{i}", "colocated") for i in range(num_decode)]
        for worker_id, role in roles:
            self.workers[WorkerId(worker_id)] = FakeWorker(self, worker_id, role)

    def happens(self, what: str) -> bool:
        return self.chance.random() < self.trouble * (0.3 if what == "preempted" else 1.0)

    def deliver_to_worker(self, worker_id: WorkerId, message: Message) -> None:
        assert self.router.workers[worker_id].is_alive, "the router speaks to the dead"
        worker = self.workers[worker_id]
        self.network.send("router", worker_id, lambda: worker.on(message))

    def kill(self, worker_id: WorkerId) -> None:
        self.workers[worker_id].is_alive = False
        notice_s = self.network.now_s + self.chance.expovariate(0.5)
        now = self.network
        self.network.later(lambda: self.router.on_worker_dead(worker_id, "killed", now.now_s), notice_s)

    def submit(self, routed: RoutedRequest) -> None:
        self.network.later(lambda: self.router.submit(routed, self.network.now_s))

    def abort_later(self, request_id: RequestId) -> None:
        at_s = self.network.now_s + self.chance.uniform(0, 25)
        self.network.later(lambda: self.router.finish(request_id, "abort", self.network.now_s), at_s)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(0, 3),
    st.integers(1, 3),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.integers(0, 3),
    st.booleans(),
)
def test_every_request_ends_once_and_every_block_comes_home(
    seed: int,
    num_prefill: int,
    num_decode: int,
    policy: str,
    trouble: float,
    num_deaths: int,
    some_abort: bool,
) -> None:
    world = World(seed, num_prefill, num_decode, policy, trouble)
    requests = [
        request(i, world.chance.choice([1, 2, 64, 65, 70]), world.chance.randint(1, 6)) for i in range(8)
    ]
    for routed in requests:
        world.submit(routed)
        if some_abort and world.chance.random() < 0.4:
            world.abort_later(routed.request_id)
    for worker_id in world.chance.sample(sorted(world.workers), min(num_deaths, len(world.workers))):
        world.network.later(lambda w=worker_id: world.kill(w), world.chance.uniform(0, 30))  # type: ignore[misc]
    world.network.run()
    check_rest(world, requests)
    if not trouble and not num_deaths and not some_abort:
        assert world.router.counts.num_ended["finished"] == len(requests)


def check_rest(world: World, requests: list[RoutedRequest]) -> None:
    assert world.router.requests == {}
    for routed in requests:
        updates = world.updates[routed.request_id]
        ends = [u for u in updates if u.error is not None or u.finish_reason is not None]
        assert len(ends) == 1, f"{routed.request_id} ended {len(ends)} times"
        assert updates[-1] is ends[0], "nothing follows the end"
        tokens = [u.token_id for u in updates if u.token_id is not None]
        first = routed.num_prompt_tokens
        assert tokens == [next_token(routed.seed, first + i) for i in range(len(tokens))]
        assert routed.token_ids[first:] == tokens
        if ends[0].finish_reason == "length":
            assert len(routed.token_ids) == routed.max_total_tokens
        timings = routed.ledger.timings(ends[0].at_s)
        parts = (getattr(timings, name) for name in timings.__struct_fields__[:6])
        assert sum(parts) == pytest.approx(timings.e2e_s, abs=1e-6)
    for load in world.router.fleet.loads.values():
        assert (load.num_prefill_tokens, load.num_requests) == (0, 0), load
    assert not world.router._writers, "the router still waits for writers"
    for ticket_id, decode in world.minted.items():
        if decode.is_alive:
            assert world.ended[ticket_id] <= 1
            assert world.ended[ticket_id] or world.gone[ticket_id], "nobody told decode about the writer"
    for worker in world.workers.values():
        if worker.is_alive:
            worker.pool.check()
            assert len(worker.book) == 0, "a ticket never ended"
            assert worker.pool.num_free == POOL_BLOCKS, "free at rest must equal free at start"
            assert not worker.jobs, "a prefill job was forgotten"
            assert not worker.running, "a sequence runs for nobody"
