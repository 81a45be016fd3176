"""TicketBook: a ticket ends once, and no block is handed out while a writer may still write to it."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from kvrelay.cache.pool import BlockPool
from kvrelay.cache.prefix import block_hashes
from kvrelay.cache.tickets import TicketBook
from kvrelay.sampling_params import SamplingParams
from kvrelay.types import RequestId, RequestSpec, TicketId, TransferTicket, WorkerId, num_blocks

LEASE_S = 10.0
POOL_BLOCKS = 8


def spec(num_tokens: int, name: str = "r", attempt: int = 1) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(name),
        attempt=attempt,
        arrival=0,
        token_ids=tuple(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        max_total_tokens=num_tokens + 1,
        params=SamplingParams(),
        seed=0,
    )


def names(num_tokens: int) -> list[bytes]:
    return block_hashes(range(num_tokens), "layout")


def book_over(pool: BlockPool, epoch: int = 1) -> TicketBook:
    return TicketBook(pool, WorkerId("decode-0"), epoch, LEASE_S)


def minted(pool: BlockPool, book: TicketBook, num_tokens: int = 65, now_s: float = 0.0) -> TransferTicket:
    return book.mint(spec(num_tokens), pool.allocate(num_blocks(num_tokens)), now_s)


@pytest.mark.parametrize(
    ("num_tokens", "num_owned", "num_named"), [(2, 1, 1), (64, 1, 1), (65, 2, 1), (66, 2, 2), (130, 3, 3)]
)
def test_ticket_names_the_pages_prefill_fills_and_owns_one_for_the_last_token(
    num_tokens: int, num_owned: int, num_named: int
) -> None:
    pool = BlockPool(POOL_BLOCKS)
    book = book_over(pool)
    ticket = minted(pool, book, num_tokens)
    assert ticket.num_tokens == num_tokens - 1
    assert len(ticket.block_ids) == num_named
    assert book.commit(ticket.ticket_id) == list(range(num_owned))
    assert pool.num_free == POOL_BLOCKS - num_owned, "a commit passes the blocks on, it does not free them"


def test_commit_closes_the_ticket_for_every_later_event() -> None:
    pool = BlockPool(POOL_BLOCKS)
    book = book_over(pool)
    ticket = minted(pool, book)
    blocks = book.commit(ticket.ticket_id)
    assert blocks is not None
    assert book.commit(ticket.ticket_id) is None
    assert book.get(ticket.ticket_id) is None
    assert not book.fill(ticket.ticket_id, 1.0)
    assert book.abort(ticket.request_id, ticket.attempt) is None
    assert book.writer_gone(ticket.ticket_id) is None
    assert book.expire(1e9) == []
    assert pool.num_free == POOL_BLOCKS - len(blocks)
    assert book.num_ignored == 4
    assert len(book) == 0


@pytest.mark.parametrize("num_cached", [0, 1, 2])
def test_ticket_names_no_block_that_is_full_already(num_cached: int) -> None:
    pool = BlockPool(POOL_BLOCKS)
    book = book_over(pool)
    blocks = pool.allocate(3)
    ticket = book.mint(spec(150), blocks, 0.0, num_cached)
    assert ticket.block_ids == tuple(blocks[num_cached:])
    assert (ticket.num_cached_tokens, ticket.num_tokens) == (num_cached * 64, 149)
    assert book.blocks(ticket.ticket_id) == blocks
    book.writer_gone(ticket.ticket_id)
    assert book.blocks(ticket.ticket_id) is None
    assert pool.num_free == POOL_BLOCKS


@pytest.mark.parametrize("end", ["abort", "expire"])
def test_blocks_of_a_closed_ticket_wait_for_the_writer(end: str) -> None:
    pool = BlockPool(POOL_BLOCKS)
    book = book_over(pool)
    ticket = minted(pool, book)
    if end == "abort":
        assert book.abort(ticket.request_id, ticket.attempt) == ticket.ticket_id
    else:
        assert book.expire(LEASE_S) == [ticket]
    assert book.commit(ticket.ticket_id) is None
    assert book.get(ticket.ticket_id) is None
    assert book.expire(1e9) == []
    assert pool.num_free == POOL_BLOCKS - 2
    assert book.writer_gone(ticket.ticket_id) == ticket
    assert book.writer_gone(ticket.ticket_id) is None
    assert pool.num_free == POOL_BLOCKS
    pool.check()


@pytest.mark.parametrize(("silence_s", "expires"), [(9.999, False), (10.0, True), (11.0, True)])
def test_lease_runs_from_the_last_sign_of_life(silence_s: float, expires: bool) -> None:
    pool = BlockPool(POOL_BLOCKS)
    book = book_over(pool)
    ticket = minted(pool, book, now_s=0.0)
    assert book.fill(ticket.ticket_id, 9.0)
    assert bool(book.expire(9.0 + silence_s)) is expires


def test_abort_of_another_attempt_touches_nothing() -> None:
    pool = BlockPool(POOL_BLOCKS)
    book = book_over(pool)
    ticket = minted(pool, book)
    assert book.abort(ticket.request_id, 2) is None
    assert book.abort(RequestId("other"), 1) is None
    assert book.get(ticket.ticket_id) == ticket


def test_ticket_of_an_earlier_epoch_opens_nothing() -> None:
    before, after = BlockPool(POOL_BLOCKS), BlockPool(POOL_BLOCKS)
    stale = minted(before, book_over(before, epoch=1))
    book = book_over(after, epoch=2)
    live = minted(after, book)
    assert live.epoch == 2
    assert live.ticket_id != stale.ticket_id
    assert not book.fill(stale.ticket_id, 1.0)
    assert book.commit(stale.ticket_id) is None
    assert book.writer_gone(stale.ticket_id) is None
    assert book.get(live.ticket_id) == live


@dataclass
class Model:
    """What a ticket and its writer should be, kept beside the real book."""

    ticket: TransferTicket
    blocks: list[int]
    expires_s: float
    state: str = "open"  # open, closing, committed, freed
    writer_may_write: bool = True
    num_ends: int = 0


class TicketMachine(RuleBasedStateMachine):
    """Random events, in any order and any number of times, against a model of the writers."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.now_s, self.epoch, self.num_requests = 0.0, 1, 0
        self.restart_worker()

    def restart_worker(self) -> None:
        self.pool = BlockPool(POOL_BLOCKS)
        self.book = book_over(self.pool, self.epoch)
        self.models: dict[TicketId, Model] = {}
        self.running: list[list[int]] = []

    @rule(target=tickets, num_tokens=st.sampled_from([2, 63, 64, 65, 66, 129, 130, 194]))
    def mint(self, num_tokens: int) -> object:
        """All requests begin with the same tokens: what was committed is found and shared."""
        cached = self.pool.find(names(num_tokens - 1)[: (num_tokens - 2) // 64])
        needed = num_blocks(num_tokens) - len(cached)
        if not self.pool.can_allocate(needed, cached):
            return multiple()
        self.pool.retain(cached)
        blocks = cached + self.pool.allocate(needed)
        for model in self.models.values():
            assert not (model.writer_may_write and set(model.ticket.block_ids) & set(blocks)), (
                "a block was handed out while a writer may still write to it"
            )
        self.num_requests += 1
        request = spec(num_tokens, f"r{self.num_requests}")
        ticket = self.book.mint(request, blocks, self.now_s, len(cached))
        assert ticket.ticket_id not in self.models
        assert not set(ticket.block_ids) & set(cached), "a writer may not touch what others read"
        assert ticket.num_cached_tokens == len(cached) * 64
        assert ticket.num_cached_tokens + 64 * len(ticket.block_ids) >= ticket.num_tokens
        self.models[ticket.ticket_id] = Model(ticket, blocks, self.now_s + LEASE_S)
        return ticket

    @rule(ticket=tickets)
    def fill(self, ticket: TransferTicket) -> None:
        model = self.models.get(ticket.ticket_id)
        is_open = model is not None and model.state == "open"
        assert self.book.fill(ticket.ticket_id, self.now_s) is is_open
        if model is not None and is_open:
            model.expires_s = self.now_s + LEASE_S

    @rule(ticket=tickets)
    def commit(self, ticket: TransferTicket) -> None:
        model = self.models.get(ticket.ticket_id)
        blocks = self.book.commit(ticket.ticket_id)
        if model is None or model.state != "open":
            assert blocks is None
            return
        assert blocks == model.blocks
        model.state, model.writer_may_write = "committed", False
        model.num_ends += 1
        self.running.append(blocks)
        full = names(model.ticket.num_tokens)
        self.pool.publish(blocks[: len(full)], full)

    @rule(ticket=tickets)
    def abort(self, ticket: TransferTicket) -> None:
        model = self.models.get(ticket.ticket_id)
        closed = self.book.abort(ticket.request_id, ticket.attempt)
        is_known = model is not None and model.state in ("open", "closing")
        assert (closed == ticket.ticket_id) is is_known
        if model is not None and model.state == "open":
            model.state = "closing"
            model.num_ends += 1

    @rule(ticket=tickets)
    def writer_gone(self, ticket: TransferTicket) -> None:
        model = self.models.get(ticket.ticket_id)
        free = self.pool.num_free
        found = self.book.writer_gone(ticket.ticket_id)
        if model is None or model.state in ("committed", "freed"):
            assert found is None
            assert self.pool.num_free == free
            return
        assert found == ticket
        others = [m.blocks for m in self.models.values() if m.state in ("open", "closing") and m is not model]
        kept = {block for blocks in (*others, *self.running) for block in blocks}
        assert self.pool.num_free == free + len(set(model.blocks) - kept)
        model.num_ends += model.state == "open"
        model.state, model.writer_may_write = "freed", False

    @rule(seconds=st.sampled_from([0.0, 1.0, LEASE_S / 2, LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        due = {
            key
            for key, model in self.models.items()
            if model.state == "open" and model.expires_s <= self.now_s
        }
        assert {ticket.ticket_id for ticket in self.book.expire(self.now_s)} == due
        for key in due:
            self.models[key].state = "closing"
            self.models[key].num_ends += 1

    @rule(index=st.integers(0, 20))
    def sequence_ends(self, index: int) -> None:
        if self.running:
            self.pool.release(self.running.pop(index % len(self.running)))

    @rule()
    def worker_restarts(self) -> None:
        """Tickets of the old epoch stay in the bundle: all their events come late now."""
        self.epoch += 1
        self.restart_worker()

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.pool.check()
        held = [model for model in self.models.values() if model.state in ("open", "closing")]
        promised = {block for model in held for block in model.blocks}
        owned = promised | {block for blocks in self.running for block in blocks}
        assert self.pool.num_free == POOL_BLOCKS - len(owned)
        assert (len(self.book), self.book.num_blocks) == (len(held), len(promised))
        for model in self.models.values():
            assert model.num_ends == (model.state != "open"), "a ticket ends exactly once"
            is_live = model.state == "open"
            assert (self.book.get(model.ticket.ticket_id) is not None) is is_live

    def teardown(self) -> None:
        for key, model in self.models.items():
            if model.state in ("open", "closing"):
                self.book.writer_gone(key)
        for blocks in self.running:
            self.pool.release(blocks)
        self.pool.check()
        assert self.pool.num_free == POOL_BLOCKS, "free at rest must equal free at start"


TestTicketMachine = TicketMachine.TestCase
TestTicketMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
