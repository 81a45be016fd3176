"""Prefill-side scheduler: chunks of several prompts under a token budget, by rank, short ones let through.

Rank is priority, then age. Knows block ids, names of contents and token counts. Knows nothing about tensors,
sockets or text.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvrelay.cache.arrivals import Tiles
from kvrelay.cache.pool import BlockPool
from kvrelay.cache.prefix import NO_PREFIXES, Prefixes
from kvrelay.sparse import SparseAttention
from kvrelay.types import BLOCK_SIZE, RequestSpec, TicketId, TransferTicket, num_blocks

if TYPE_CHECKING:
    from kvrelay.transport.base import Write


@dataclass(frozen=True, slots=True)
class Posted:
    """A write on its way, and the pages of the sequence that it is of."""

    write: "Write"
    pages: tuple[int, ...]


@dataclass(slots=True, eq=False)
class PrefillJob:
    """One prompt on its way into the KV cache.

    `block_ids` are the pages being filled: this worker's own, or the ticket's (`is_local`) when decode will
    run right here. The job is over once everything is computed and no write is outstanding.
    """

    request: RequestSpec
    ticket: TransferTicket
    is_local: bool
    block_ids: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of its full blocks
    is_begun: bool = False
    num_cached: int = 0  # tokens whose KV was there when the job began
    num_computed: int = 0  # those included
    outstanding: dict[int, Posted] = field(default_factory=dict)  # by identity of the write
    num_bytes_written: int = 0  # of K and V
    last_write_s: float = 0.0  # when a write was last posted or completed
    completed_s: float = 0.0  # when a write last completed
    unreported_s: float = 0.0  # no outstanding write began before this
    early: SparseAttention | None = None  # how decode reads, where it starts before everything has come
    foreseen: Tiles = field(default_factory=dict)  # what decode's first step reads
    untold: list[Posted] = field(default_factory=list)  # complete, and decode does not know
    num_untold_bytes: int = 0
    num_last_tiles: int = 0  # of K and V in the last layer, complete
    holds_until_s: float | None = None  # decode has started: without a sign of life from it

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV must be there in the end."""
        return self.request.num_prefill_tokens

    @property
    def num_outstanding_writes(self) -> int:
        """Writes that were posted and are not complete."""
        return len(self.outstanding)

    @property
    def num_left(self) -> int:
        """Tokens to compute yet."""
        return self.num_tokens - self.num_computed

    @property
    def is_computed(self) -> bool:
        """Whether every token's KV is there."""
        return self.num_left <= 0

    @property
    def first_page(self) -> int:
        """The first page that decode does not have; the ticket's blocks begin there."""
        return self.ticket.num_cached_tokens // BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `length` tokens of a job, from token `start`; starts and, but for the last, ends on a page."""

    job: PrefillJob
    start: int
    length: int

    @property
    def foresees(self) -> bool:
        """Whether these are the last tokens before decode starts with a part of the KV."""
        return self.job.early is not None and self.start + self.length >= self.job.num_tokens

    @property
    def has_room_ahead(self) -> bool:
        """Whether it foresees, and the job's pages have room for the token that decode starts with."""
        return self.foresees and self.job.num_tokens < len(self.job.block_ids) * BLOCK_SIZE

    @property
    def pages(self) -> range:
        """Indices into the job's block list that this chunk completes or begins."""
        return range(self.start // BLOCK_SIZE, num_blocks(self.start + self.length))


class PrefillScheduler:
    """Waiting and running prefill jobs of one worker; chunks and shared prefixes end on its unit."""

    def __init__(self, pool: BlockPool, chunk_tokens: int | None, prefixes: Prefixes = NO_PREFIXES) -> None:
        self._pool, self._chunk_tokens, self._prefixes = pool, chunk_tokens, prefixes
        self._jobs: dict[TicketId, PrefillJob] = {}
        self._by_rank: list[PrefillJob] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[PrefillJob]:
        return iter(self._jobs.values())

    def add(self, job: PrefillJob) -> None:
        """Queue a job by rank. A local one brings the ticket's own list of all its blocks."""
        job.names = self._prefixes.names_of(job.request)
        self._jobs[job.ticket.ticket_id] = job
        insort(self._by_rank, job, key=lambda other: other.request.rank)

    def get(self, ticket_id: TicketId) -> PrefillJob | None:
        """The job that fills this ticket."""
        return self._jobs.get(ticket_id)

    def remove(self, job: PrefillJob) -> None:
        """Forget a job and free the pages that are this worker's own."""
        del self._jobs[job.ticket.ticket_id]
        self._by_rank.remove(job)
        if not job.is_local:
            self._pool.release(job.block_ids)

    def plan(self, num_taken: int = 0) -> tuple[list[Chunk], list[PrefillJob]]:
        """The next chunks, and the jobs that begin: one whose KV is all in the cache begins without a chunk.

        The chunks hold at most `chunk_tokens` tokens together, less the `num_taken` that others compute in
        the same step, and one unit always. Half of the budget goes to the first job by rank, so that nobody
        is overtaken for ever; the rest to the jobs with the fewest tokens left, so that a short prompt does
        not wait for a long one. Among equally long ones, that is first come, first served.
        """
        begun: list[PrefillJob] = []
        jobs = [job for job in self._by_rank if not job.is_computed]
        while jobs and self._begin(jobs[0], begun) and jobs[0].is_computed:
            jobs.pop(0)
        if not jobs:
            return [], begun
        if self._chunk_tokens is None:
            first = jobs[0]
            return [Chunk(first, first.num_computed, first.num_left)] if first.is_begun else [], begun
        budget = max(self._prefixes.unit_tokens, self._chunk_tokens - num_taken)
        lengths = self._deal(jobs, budget, begun)
        return [Chunk(job, job.num_computed, length) for job, length in lengths.items()], begun

    def advance(self, chunk: Chunk) -> None:
        """The chunk is computed; the blocks that it completed can be found from now on."""
        job = chunk.job
        first = job.num_computed // BLOCK_SIZE
        job.num_computed += chunk.length
        names = job.names[first : job.num_computed // BLOCK_SIZE]
        self._pool.publish(job.block_ids[first : first + len(names)], names)

    def _deal(self, jobs: list[PrefillJob], budget: int, begun: list[PrefillJob]) -> dict[PrefillJob, int]:
        """Tokens for each job. While the first by rank waits for pages, nobody else is given any."""
        first = jobs[0]
        lengths: dict[PrefillJob, int] = {}
        if first.is_begun:
            lengths[first] = self._cut(first.num_left, max(self._prefixes.unit_tokens, budget // 2))
            budget -= lengths[first]
        left = {job: self._num_left(job) for job in jobs}
        for job in sorted(jobs, key=lambda job: (job.request.params.priority, left[job])):
            has_turn = job.is_begun or first.is_begun
            if not has_turn or not self._cut(left[job], budget) or not self._begin(job, begun):
                continue
            length = self._cut(job.num_left - lengths.get(job, 0), budget)
            if length:
                lengths[job] = lengths.get(job, 0) + length
                budget -= length
        return lengths

    def _num_left(self, job: PrefillJob) -> int:
        """Tokens to compute yet, as far as the cache tells before the job begins; at least one."""
        cached = 0 if job.is_begun else len(self._find(job)) * BLOCK_SIZE
        return max(1, job.num_left - cached)

    def _begin(self, job: PrefillJob, begun: list[PrefillJob]) -> bool:
        """Give the job its pages, cached ones first; False while there are too few."""
        if job.is_begun:
            return True
        cached = self._find(job)
        if job.is_local:
            num_full = self._share_local(job, cached)
        else:
            count = num_blocks(job.num_tokens)
            if not self._pool.can_allocate(count - len(cached), cached):
                return False
            job.block_ids, num_full = self._pool.take(job.names, count, self._multiple)
        job.num_cached = job.num_computed = num_full * BLOCK_SIZE
        job.is_begun = True
        begun.append(job)
        return True

    def _share_local(self, job: PrefillJob, cached: list[int]) -> int:
        """How many blocks are full; those that others filled since its own were reserved take their place."""
        page = job.first_page
        late = cached[page:]
        self._pool.retain(late)
        self._pool.release(job.block_ids[page : page + len(late)])
        job.block_ids[page : page + len(late)] = late
        return max(page, len(cached))

    def _find(self, job: PrefillJob) -> list[int]:
        return self._pool.find(job.names, self._multiple)

    @property
    def _multiple(self) -> int:
        return self._prefixes.unit_tokens // BLOCK_SIZE

    def _cut(self, length: int, budget: int) -> int:
        """All of `length` if the budget holds it, else whole units."""
        unit = self._prefixes.unit_tokens
        return length if length <= budget else budget // unit * unit
