"""The decode side: reserves blocks, commits tickets, and turns committed prompts into tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.cache.tickets import TicketBook
from kvrelay.decode_steps import Tokens
from kvrelay.errors import LeaseExpired, ModelError, TransferFailed
from kvrelay.scheduler.decode import PENDING, Admission, DecodeScheduler, DecodeSequence
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


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way: its batch, the place of each sequence's new token, and the wait for all of them."""

    batch: Sequence[DecodeSequence]
    places: Sequence[int]
    tokens: Tokens
    start_s: float
    cpu_s: float


class DecodeSide:
    """Owns the tickets and the running sequences of one worker."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        config = parts.config
        self.scheduler = DecodeScheduler(parts.pool, config.engine.max_num_seqs, parts.prefixes)
        self.tickets = TicketBook(parts.pool, config.worker_id, config.epoch, config.engine.lease_s)
        self._reserved: dict[TicketId, Admission] = {}
        self._begun: Step | None = None
        self._ended_s = 0.0

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
        """Begin one more token for every sequence of the next batch; how many are in it, or in the last.

        Its tokens are reported before this returns; where the runner runs ahead, those of the step before.
        """
        is_ahead = self._parts.runner.runs_ahead(self.scheduler.running)
        num_ended = 0 if is_ahead else self._end_step()
        batch, preempted = self.scheduler.plan()
        for sequence in preempted:
            request = sequence.request
            self._parts.send(Preempted(request_id=request.request_id, attempt=request.attempt))
        begun = self._begin_step(batch) if batch else None
        num_ended += self._end_step()
        self._begun = begun
        if not is_ahead:
            self._end_step()
        return len(batch) or num_ended

    def reported_until(self, now_s: float) -> float:
        """The time before which every step that began has been reported."""
        return now_s if self._begun is None else self._begun.start_s

    def close(self) -> int:
        """Drop everything; the number of blocks that stay promised to a writer."""
        for sequence in list(self.scheduler.running):
            self.scheduler.remove(sequence)
        self.scheduler.waiting.clear()
        self._begun = None
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

    def _begin_step(self, batch: Sequence[DecodeSequence]) -> Step | None:
        """Launch the batch's step; None when it failed."""
        start_s, cpu_s = time.monotonic(), time.process_time()
        for sequence in batch:
            if not sequence.started:
                sequence.started = True
                self._parts.mark(sequence.request, "decode_started", start_s)
        places = [len(sequence.token_ids) for sequence in batch]
        try:
            tokens = self._parts.runner.launch(batch)
        except RuntimeError as error:  # torch's, out of memory included
            self._fail_step(batch, error)
            return None
        for sequence in batch:
            sequence.token_ids.append(PENDING)
        return Step(batch, places, tokens, start_s, time.process_time() - cpu_s)

    def _end_step(self) -> int:
        """Wait for the step that has begun, if any, and report its tokens; how many sequences it had.

        Those that were preempted or withdrawn meanwhile get none, nor do those of a step that failed.
        """
        step, self._begun = self._begun, None
        if step is None:
            return 0
        cpu_s = time.process_time()
        try:
            results = step.tokens()
        except RuntimeError as error:
            self._fail_step(step.batch, error)
            return len(step.batch)
        start_s, self._ended_s = max(step.start_s, self._ended_s), time.monotonic()
        tokens = []
        for sequence, place, result in zip(step.batch, step.places, results, strict=True):
            if sequence not in self.scheduler.running:
                continue
            later = sequence.token_ids[place + 1 :]
            del sequence.token_ids[place:]
            if result is None:
                self._fail_unsound(sequence)
            else:
                tokens.append(self._append(sequence, later, *result))
        self._report(step.batch, tokens, start_s, step.cpu_s + time.process_time() - cpu_s)
        return len(step.batch)

    def _fail_step(self, batch: Sequence[DecodeSequence], error: RuntimeError) -> None:
        lost = [sequence for sequence in batch if sequence in self.scheduler.running]
        for sequence in lost:
            self.scheduler.remove(sequence, is_sound=False)
        self._parts.fail_step([sequence.request for sequence in lost], error)

    def _fail_unsound(self, sequence: DecodeSequence) -> None:
        self.scheduler.remove(sequence, is_sound=False)
        position = len(sequence.token_ids)
        error = ModelError(
            f"the logits at position {position} are not finite numbers: no token can be chosen"
        )
        self._parts.fail(sequence.request, error, retryable=False)

    def _append(
        self, sequence: DecodeSequence, later: Sequence[int], token_id: int, logprobs: TokenLogprobs | None
    ) -> NewToken:
        """Give the sequence its newest token, and back those that are `later`, still to be computed."""
        sequence.token_ids.append(token_id)
        reason: FinishReason | None = self.scheduler.finish_reason(sequence, self._parts.runner.eos_token_ids)
        if reason is not None:
            self.scheduler.remove(sequence)
        sequence.token_ids += later
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
        cpu_s: float,
    ) -> None:
        self._parts.send(
            StepReport(
                worker_id=self._parts.config.worker_id,
                phase="decode",
                start_s=start_s,
                end_s=self._ended_s,
                cpu_s=cpu_s,
                num_tokens={token.request_id: 1 for token in tokens},
                tokens=tuple(tokens),
                attention=self._parts.runner.attention_by([sequence.request for sequence in batch]),
            )
        )
