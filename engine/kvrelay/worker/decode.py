"""The decode side: reserves blocks, commits tickets, and turns committed prompts into tokens."""

import time
from collections.abc import Sequence

from kvrelay.cache.tickets import TicketBook
from kvrelay.errors import LeaseExpired, ModelError, TransferFailed
from kvrelay.scheduler.decode import Admission, DecodeScheduler, DecodeSequence
from kvrelay.types import BLOCK_SIZE, FinishReason, TicketId, TokenLogprobs, TransferTicket, num_blocks
from kvrelay.wire import (
    Abort,
    Filled,
    Filling,
    NewToken,
    Preempted,
    Reserve,
    Reserved,
    StepReport,
    WriterGone,
)
from kvrelay.worker.parts import WorkerParts


class DecodeSide:
    """Owns the tickets and the running sequences of one worker."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        config = parts.config
        self.scheduler = DecodeScheduler(parts.pool, config.engine.max_num_seqs, parts.prefixes)
        self.tickets = TicketBook(parts.pool, config.worker_id, config.epoch, config.engine.lease_s)
        self._reserved: dict[TicketId, Admission] = {}

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

    def on_notice(self, message: Filling | Filled) -> None:
        """A writer's sign of life, or its end."""
        match message:
            case Filling():
                self.tickets.fill(message.ticket_id, time.monotonic())
            case Filled():
                self._on_filled(message)

    def commit_local(self, ticket_id: TicketId) -> None:
        """The prefill side of this worker computed straight into the ticket's blocks."""
        admission = self._reserved.pop(ticket_id, None)
        blocks = self.tickets.commit(ticket_id)
        if admission is not None and blocks is not None:
            self._run(admission, blocks)

    def abort(self, message: Abort) -> None:
        """Withdraw an attempt wherever it stands; a ticket's blocks stay put until its writer is gone."""
        self.scheduler.withdraw(message.request_id, message.attempt)
        ticket_id = self.tickets.abort(message.request_id, message.attempt)
        if ticket_id is not None:
            self._reserved.pop(ticket_id, None)

    def writer_gone(self, message: WriterGone) -> None:
        """No write can reach the ticket's blocks any more."""
        self.tickets.writer_gone(message.ticket_id)
        self._reserved.pop(message.ticket_id, None)

    def expire(self, now_s: float) -> None:
        """Give up tickets whose writer fell silent."""
        for ticket in self.tickets.expire(now_s):
            reason = f"KV of {ticket.request_id}: the writer was silent for {ticket.lease_s:g} s"
            self._give_up(ticket, LeaseExpired(reason))

    def step(self) -> int:
        """One token for every sequence of the next batch; how many were in it."""
        batch, preempted = self.scheduler.plan()
        for sequence in preempted:
            request = sequence.request
            self._parts.send(Preempted(request_id=request.request_id, attempt=request.attempt))
        if not batch:
            return 0
        start_s, cpu_s = time.monotonic(), time.process_time()
        for sequence in batch:
            if not sequence.started:
                sequence.started = True
                self._parts.mark(sequence.request, "decode_started", start_s)
        try:
            results = self._parts.runner.decode(batch)
        except RuntimeError as error:  # torch's, out of memory included
            for sequence in batch:
                self.scheduler.remove(sequence)
            self._parts.fail_step([sequence.request for sequence in batch], error)
            return len(batch)
        end_s = time.monotonic()
        tokens = []
        for sequence, result in zip(batch, results, strict=True):
            if result is None:
                self._fail_unsound(sequence)
            else:
                tokens.append(self._append(sequence, *result))
        self._report(batch, tokens, start_s, end_s, time.process_time() - cpu_s)
        return len(batch)

    def close(self) -> int:
        """Drop everything; the number of blocks that stay promised to a writer."""
        for sequence in list(self.scheduler.running):
            self.scheduler.remove(sequence)
        self.scheduler.waiting.clear()
        return self.tickets.num_blocks

    def _on_filled(self, message: Filled) -> None:
        ticket = self.tickets.get(message.ticket_id)
        if ticket is None or message.ticket_id not in self._reserved:
            return
        defect = self._defect(ticket, message)
        if defect:
            self._give_up(ticket, TransferFailed(f"KV of {ticket.request_id}: {defect}"))
            self.tickets.writer_gone(ticket.ticket_id)  # it has said that it is done writing
            return
        self._parts.store.land(ticket.block_ids)
        blocks = self._reserved[ticket.ticket_id].block_ids
        self._parts.store.refresh_stats(blocks[: num_blocks(ticket.num_tokens)], ticket.num_tokens)
        self.commit_local(ticket.ticket_id)

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
            if wrong or len(mine) != len(message.digests):
                return f"the digests of blocks {wrong} of {len(mine)} differ from the writer's"
        return ""

    def _give_up(self, ticket: TransferTicket, error: TransferFailed) -> None:
        admission = self._reserved.pop(ticket.ticket_id, None)
        self.tickets.abort(ticket.request_id, ticket.attempt)
        if admission is not None:
            self._parts.fail(admission.request, error, retryable=True)

    def _run(self, admission: Admission, blocks: list[int]) -> None:
        request, names = admission.request, admission.names
        self._parts.pool.publish(blocks[: len(names)], names)
        self.scheduler.run(DecodeSequence(request, blocks, list(request.token_ids)))
        self._parts.mark(request, "kv_committed")

    def _fail_unsound(self, sequence: DecodeSequence) -> None:
        self.scheduler.remove(sequence, is_sound=False)
        position = len(sequence.token_ids)
        error = ModelError(
            f"the logits at position {position} are not finite numbers: no token can be chosen"
        )
        self._parts.fail(sequence.request, error, retryable=False)

    def _append(self, sequence: DecodeSequence, token_id: int, logprobs: TokenLogprobs | None) -> NewToken:
        sequence.token_ids.append(token_id)
        reason: FinishReason | None = self.scheduler.finish_reason(sequence, self._parts.runner.eos_token_ids)
        if reason is not None:
            self.scheduler.remove(sequence)
        return NewToken(
            request_id=sequence.request.request_id,
            attempt=sequence.request.attempt,
            token_id=token_id,
            logprobs=logprobs,
            finish_reason=reason,
        )

    def _report(
        self,
        batch: Sequence[DecodeSequence],
        tokens: Sequence[NewToken],
        start_s: float,
        end_s: float,
        cpu_s: float,
    ) -> None:
        self._parts.send(
            StepReport(
                worker_id=self._parts.config.worker_id,
                phase="decode",
                start_s=start_s,
                end_s=end_s,
                cpu_s=cpu_s,
                num_tokens={token.request_id: 1 for token in tokens},
                tokens=tuple(tokens),
                attention=self._parts.runner.attention_by([sequence.request for sequence in batch]),
            )
        )
