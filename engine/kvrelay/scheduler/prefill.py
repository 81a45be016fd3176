"""Prefill-side scheduler: first come, first served, in chunks of a token budget.

Knows block ids and token counts. Knows nothing about tensors, sockets or text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvrelay.cache.pool import BlockPool
from kvrelay.types import BLOCK_SIZE, RequestSpec, TicketId, TransferTicket, num_blocks


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
    num_computed: int = 0
    num_outstanding_writes: int = 0
    num_bytes_written: int = 0
    last_write_s: float = 0.0  # when a write was last posted or completed
    completed_s: float = 0.0  # when a write last completed
    unreported_s: float = 0.0  # no outstanding write began before this

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return self.request.num_prefill_tokens

    @property
    def is_computed(self) -> bool:
        """Whether every token's KV has been computed."""
        return self.num_computed >= self.num_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `length` tokens of a job, from token `start`; starts and, but for the last, ends on a page."""

    job: PrefillJob
    start: int
    length: int

    @property
    def pages(self) -> range:
        """Indices into the job's block list that this chunk completes or begins."""
        return range(self.start // BLOCK_SIZE, num_blocks(self.start + self.length))


class PrefillScheduler:
    """Waiting and running prefill jobs of one worker; chunks are cut at multiples of `unit_tokens`."""

    def __init__(self, pool: BlockPool, chunk_tokens: int | None, unit_tokens: int = BLOCK_SIZE) -> None:
        self._pool, self._chunk_tokens, self._unit_tokens = pool, chunk_tokens, unit_tokens
        self._jobs: dict[TicketId, PrefillJob] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[PrefillJob]:
        return iter(self._jobs.values())

    def add(self, job: PrefillJob) -> None:
        """Queue a job behind the others."""
        if job.is_local:
            job.block_ids = list(job.ticket.block_ids)
        self._jobs[job.ticket.ticket_id] = job

    def get(self, ticket_id: TicketId) -> PrefillJob | None:
        """The job that fills this ticket."""
        return self._jobs.get(ticket_id)

    def remove(self, job: PrefillJob) -> None:
        """Forget a job and free the pages that are this worker's own."""
        del self._jobs[job.ticket.ticket_id]
        if not job.is_local:
            self._pool.release(job.block_ids)

    def plan(self) -> list[Chunk]:
        """The next chunks, oldest job first, at most `chunk_tokens` tokens together.

        A job that finds no free pages holds back those behind it, so that none is overtaken for ever.
        """
        chunks: list[Chunk] = []
        budget = self._chunk_tokens
        for job in self._jobs.values():
            if job.is_computed:
                continue
            if budget == 0 or not self._has_pages(job):
                break
            length = job.num_tokens - job.num_computed
            if budget is not None:
                length = min(length, budget)
                budget = (budget - length) // self._unit_tokens * self._unit_tokens
            chunks.append(Chunk(job, job.num_computed, length))
            if self._chunk_tokens is None:
                break
        return chunks

    def _has_pages(self, job: PrefillJob) -> bool:
        needed = num_blocks(job.num_tokens)
        if not job.block_ids and self._pool.can_allocate(needed):
            job.block_ids = self._pool.allocate(needed)
        return len(job.block_ids) >= needed
