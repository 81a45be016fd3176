"""The decode side: reserves blocks and commits tickets; what is committed goes on to `generation`."""

import time

from kvrelay.cache.tickets import TicketBook
from kvrelay.errors import LeaseExpired, TransferFailed
from kvrelay.scheduler.decode import Admission, DecodeScheduler, DecodeSequence
from kvrelay.types import BLOCK_SIZE, HandOff, TicketId, TransferTicket, num_blocks
from kvrelay.wire import Abort, Arrived, Filled, Filling, Notification, Reserve, Reserved, WriterGone
from kvrelay.worker.early import EarlySequences
from kvrelay.worker.generation import Generation
from kvrelay.worker.parts import WorkerParts


class DecodeSide:
    """Owns the tickets and the running sequences of one worker."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        config = parts.config
        self.scheduler = DecodeScheduler(parts.pool, config.engine.max_num_seqs, parts.prefixes)
        self.tickets = TicketBook(parts.pool, config.worker_id, config.epoch, config.engine.lease_s)
        self._reserved: dict[TicketId, Admission] = {}
        self._early = EarlySequences(parts)
        self._generation = Generation(parts, self.scheduler, self._early)
        self.step, self.reported_until = self._generation.step, self._generation.reported_until

    def reserve(self, message: Reserve) -> None:
        """Queue a request for blocks; `Reserved` answers once it has them."""
        self.scheduler.reserve(message.request)
        self.admit()

    def admit(self) -> None:
        """Answer as many waiting reservations as there is room for."""
        while (admission := self.scheduler.admit(len(self.tickets))) is not None:
            request, num_cached = admission.request, admission.num_cached_tokens
            now_s = time.monotonic()
            self._parts.count_cached(request.num_prefill_tokens, num_cached)
            ticket = None
            if num_cached < request.num_prefill_tokens:
                ticket = self.tickets.mint(request, admission.block_ids, now_s, num_cached // BLOCK_SIZE)
                self._reserved[ticket.ticket_id] = admission
            self._parts.send(
                Reserved(
                    request_id=request.request_id,
                    attempt=request.attempt,
                    ticket=ticket,
                    at_s=now_s,
                    num_cached_tokens=num_cached,
                )
            )
            if ticket is None:
                self._run(admission, admission.block_ids)

    def on_notice(self, message: Notification) -> None:
        """A writer's sign of life, what came of it so far, or its end."""
        match message:
            case Arrived():
                self.tickets.fill(message.ticket_id, time.monotonic())
                self._on_arrived(message)
            case Filling():
                self.tickets.fill(message.ticket_id, time.monotonic())
            case Filled():
                self._on_filled(message)

    def commit_local(self, ticket_id: TicketId, num_bytes: int = 0) -> None:
        """The ticket's blocks are full: by this worker's prefill side, or by so many bytes of another's."""
        admission = self._reserved.pop(ticket_id, None)
        blocks = self.tickets.commit(ticket_id)
        if admission is None or blocks is None:
            return
        if self._early.complete(ticket_id) is None:
            self._run(admission, blocks, num_bytes)
            return
        self._parts.pool.publish(blocks[: len(admission.names)], admission.names)
        self._parts.pool.release(blocks)  # the sequence, if it still runs, holds them too
        self._parts.mark(admission.request, "kv_committed")

    def abort(self, message: Abort) -> None:
        """Withdraw an attempt wherever it stands; a ticket's blocks stay put until its writer is gone."""
        self.scheduler.withdraw(message.request_id, message.attempt)
        ticket_id = self.tickets.abort(message.request_id, message.attempt)
        if ticket_id is not None:
            self._forget(ticket_id)

    def writer_gone(self, message: WriterGone) -> None:
        """No write can reach the ticket's blocks any more."""
        self.tickets.writer_gone(message.ticket_id)
        self._forget(message.ticket_id)

    def renew(self, now_s: float) -> None:
        """Tell the writers of sequences that already run that the rest of their KV is still wanted."""
        self._early.renew(now_s)

    def expire(self, now_s: float) -> None:
        """Give up tickets whose writer fell silent."""
        for ticket in self.tickets.expire(now_s):
            reason = f"KV of {ticket.request_id}: the writer was silent for {ticket.lease_s:g} s"
            self._give_up(ticket, LeaseExpired(reason))

    def close(self) -> int:
        """Drop everything; the number of blocks that stay promised to a writer."""
        self._generation.close()
        self.scheduler.waiting.clear()
        return self.tickets.num_blocks

    def _on_arrived(self, message: Arrived) -> None:
        """Start the ticket's sequence, or go on with what it waited for."""
        ticket, admission = self.tickets.get(message.ticket_id), self._reserved.get(message.ticket_id)
        sequence = self._early.get(message.ticket_id)
        if ticket is None or admission is None or message.may_start is not (sequence is None):
            return
        defect = ""
        if message.layout_fingerprint != (mine := self._parts.store.layout.fingerprint()):
            defect = f"layout {message.layout_fingerprint}, expected {mine}"
        elif sequence is None:
            sequence = self._early.start(ticket, admission)
            self.scheduler.run(sequence)
            self._parts.mark(admission.request, "kv_usable")
        if sequence is not None:
            defect = defect or self._early.arrive(sequence, message)
        if defect:
            self._give_up(ticket, TransferFailed(f"KV of {ticket.request_id}: {defect}"))

    def _on_filled(self, message: Filled) -> None:
        ticket = self.tickets.get(message.ticket_id)
        if ticket is None or message.ticket_id not in self._reserved:
            return
        defect = self._defect(ticket, message)
        if defect:
            self._give_up(ticket, TransferFailed(f"KV of {ticket.request_id}: {defect}"))
            self.tickets.writer_gone(ticket.ticket_id)  # it has said that it is done writing
            return
        if self._early.get(ticket.ticket_id) is None:
            self._parts.store.land(ticket.block_ids)
            blocks = self._reserved[ticket.ticket_id].block_ids[: num_blocks(ticket.num_tokens)]
            num_new = ticket.num_tokens - ticket.num_cached_tokens
            self._parts.store.refresh_stats(blocks, ticket.num_tokens, num_new)
        self.commit_local(ticket.ticket_id, message.num_bytes)

    def _defect(self, ticket: TransferTicket, message: Filled) -> str:
        """What is wrong with the KV that arrived; empty when it is whole."""
        layout = self._parts.store.layout
        expected_bytes = len(ticket.block_ids) * layout.block_bytes
        if message.layout_fingerprint != layout.fingerprint():
            return f"layout {message.layout_fingerprint}, expected {layout.fingerprint()}"
        if (message.num_tokens, message.num_bytes) != (ticket.num_tokens, expected_bytes):
            return (
                f"{message.num_tokens} tokens in {message.num_bytes} bytes arrived, "
                f"expected {ticket.num_tokens} in {expected_bytes}"
            )
        if self._parts.config.engine.verify_kv:
            mine = self._parts.store.digests(ticket.block_ids, landed=True)
            wrong = [i for i, (a, b) in enumerate(zip(mine, message.digests, strict=False)) if a != b]
            if self._early.get(ticket.ticket_id) is not None and ticket.num_tokens % BLOCK_SIZE:
                wrong = [i for i in wrong if i < len(mine) - 1]  # decode writes to the last: compared before
            if wrong or len(mine) != len(message.digests):
                return f"the digests of blocks {wrong} of {len(mine)} differ from the writer's"
        return ""

    def _forget(self, ticket_id: TicketId) -> Admission | None:
        """The ticket will not be committed: a sequence that started on it ends."""
        sequence = self._early.pop(ticket_id)
        if sequence is not None and sequence in self.scheduler.running:
            self.scheduler.remove(sequence)
        return self._reserved.pop(ticket_id, None)

    def _give_up(self, ticket: TransferTicket, error: TransferFailed) -> None:
        admission = self._forget(ticket.ticket_id)
        self.tickets.abort(ticket.request_id, ticket.attempt)
        if admission is not None:
            self._parts.fail(admission.request, error, retryable=True)

    def _run(self, admission: Admission, blocks: list[int], num_bytes: int = 0) -> None:
        request, names = admission.request, admission.names
        self._parts.pool.publish(blocks[: len(names)], names)
        sequence = DecodeSequence(request, blocks, list(request.token_ids))
        is_first = len(sequence.token_ids) == request.num_prompt_tokens
        sequence.hand_off = HandOff(num_bytes if is_first else 0, num_bytes)
        self.scheduler.run(sequence)
        self._parts.mark(request, "kv_committed")
