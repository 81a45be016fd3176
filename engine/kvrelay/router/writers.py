"""Who may still be writing into whose blocks: open tickets, by writer."""

from kvrelay.types import TicketId, TransferTicket, WorkerId
from kvrelay.wire import WriterGone


class Writers:
    """Tickets that a prefill worker was told of, until it has said that it is done with them, or is dead."""

    def __init__(self) -> None:
        self._open: dict[TicketId, tuple[WorkerId, WorkerId]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, ticket: TransferTicket, writer: WorkerId) -> None:
        """A worker is told to fill the ticket."""
        self._open[ticket.ticket_id] = (writer, ticket.decode_worker)

    def discard(self, ticket_id: TicketId) -> None:
        """Nobody writes to the ticket any more."""
        self._open.pop(ticket_id, None)

    def writer_of(self, ticket_id: TicketId) -> WorkerId | None:
        """Who fills the ticket; None once nobody does."""
        return self._open.get(ticket_id, (None, None))[0]

    def of(self, writer: WorkerId) -> list[WriterGone]:
        """What decode workers must be told when this writer has died."""
        return [
            WriterGone(ticket_id=ticket_id, decode_worker=decode)
            for ticket_id, (other, decode) in self._open.items()
            if other == writer
        ]

    def involve(self, worker_id: WorkerId) -> bool:
        """Whether the worker may still write, or still be written to."""
        return any(worker_id in both for both in self._open.values())
