"""Reserved decode blocks from the moment they are promised to a writer until it can no longer write.

A ticket's life: RESERVED → FILLING → COMMITTED, or → CLOSING (aborted or expired) → freed. Blocks of a
ticket that may still be written to are never handed out again: they wait for the writer's end
(`writer_gone`), whatever became of the request. Knows ids and times, no tensors, no sockets.
"""

from dataclasses import dataclass
from enum import Enum

from kvrelay.cache.pool import BlockPool
from kvrelay.types import (
    BLOCK_SIZE,
    RequestId,
    RequestSpec,
    TicketId,
    TransferTicket,
    WorkerId,
    num_blocks,
)


class TicketState(Enum):
    """Where an open ticket stands; a closed one is no longer in the book."""

    RESERVED = "reserved"
    FILLING = "filling"
    CLOSING = "closing"


@dataclass(slots=True)
class _Entry:
    ticket: TransferTicket
    blocks: list[int]
    state: TicketState
    expires_s: float


class TicketBook:
    """Open tickets of one decode worker.

    Every event may come late, twice or for a ticket that is closed: such an event changes nothing and
    the method returns False or None. `num_ignored` counts them.
    """

    def __init__(self, pool: BlockPool, worker_id: WorkerId, epoch: int, lease_s: float) -> None:
        self._pool, self._worker_id, self._epoch, self._lease_s = pool, worker_id, epoch, lease_s
        self._entries: dict[TicketId, _Entry] = {}
        self._num_minted = 0
        self.num_ignored = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_blocks(self) -> int:
        """Blocks that open tickets hold; one that several share counts once."""
        return len({block for entry in self._entries.values() for block in entry.blocks})

    def mint(
        self, request: RequestSpec, blocks: list[int], now_s: float, num_cached_blocks: int = 0
    ) -> TransferTicket:
        """Promise `blocks` (already allocated; enough for all of `token_ids`) to a writer.

        The ticket names only those that the prefill fills: not the first `num_cached_blocks`, which are
        full already. The book owns them all until commit.
        """
        self._num_minted += 1
        ticket = TransferTicket(
            ticket_id=TicketId(f"{self._worker_id}/{self._epoch}/{self._num_minted}"),
            request_id=request.request_id,
            attempt=request.attempt,
            decode_worker=self._worker_id,
            epoch=self._epoch,
            block_ids=tuple(blocks[num_cached_blocks : num_blocks(request.num_prefill_tokens)]),
            num_tokens=request.num_prefill_tokens,
            num_cached_tokens=num_cached_blocks * BLOCK_SIZE,
            lease_s=self._lease_s,
        )
        self._entries[ticket.ticket_id] = _Entry(ticket, blocks, TicketState.RESERVED, now_s + self._lease_s)
        return ticket

    def get(self, ticket_id: TicketId) -> TransferTicket | None:
        """The ticket while it can still be committed."""
        entry = self._live(ticket_id)
        return entry.ticket if entry else None

    def blocks(self, ticket_id: TicketId) -> list[int] | None:
        """All blocks of an open ticket, full ones included: the book's own list, for a writer beside it.

        That writer may put other blocks with the same content in the list, retained, for released ones.
        """
        entry = self._entries.get(ticket_id)
        return entry.blocks if entry else None

    def fill(self, ticket_id: TicketId, now_s: float) -> bool:
        """The writer is alive: RESERVED → FILLING, and the lease starts again."""
        entry = self._live(ticket_id)
        if entry is None:
            return False
        entry.state, entry.expires_s = TicketState.FILLING, now_s + self._lease_s
        return True

    def commit(self, ticket_id: TicketId) -> list[int] | None:
        """The KV is whole: the blocks pass to the caller, the ticket closes. None if it cannot be."""
        if self._live(ticket_id) is None:
            return None
        return self._entries.pop(ticket_id).blocks

    def abort(self, request_id: RequestId, attempt: int) -> TicketId | None:
        """The request is no longer wanted; its blocks wait for the writer's end."""
        for entry in self._entries.values():
            ticket = entry.ticket
            if (ticket.request_id, ticket.attempt) == (request_id, attempt):
                entry.state = TicketState.CLOSING
                return ticket.ticket_id
        return None

    def expire(self, now_s: float) -> list[TransferTicket]:
        """Tickets whose writer was silent for a whole lease; their blocks wait for its end."""
        expired = [
            entry
            for entry in self._entries.values()
            if entry.state is not TicketState.CLOSING and entry.expires_s <= now_s
        ]
        for entry in expired:
            entry.state = TicketState.CLOSING
        return [entry.ticket for entry in expired]

    def writer_gone(self, ticket_id: TicketId) -> TransferTicket | None:
        """No write can reach the blocks any more: they are free. The ticket, if this is what closed it."""
        entry = self._entries.pop(ticket_id, None)
        if entry is None:
            self.num_ignored += 1
            return None
        self._pool.release(entry.blocks)
        return entry.ticket

    def _live(self, ticket_id: TicketId) -> _Entry | None:
        entry = self._entries.get(ticket_id)
        if entry is None or entry.state is TicketState.CLOSING:
            self.num_ignored += 1
            return None
        return entry
