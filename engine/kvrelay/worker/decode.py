"""The decode side: reserves blocks, commits tickets, and turns committed prompts into tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.cache.arrivals import Lacking
from kvrelay.cache.tickets import TicketBook
from kvrelay.decode_steps import Tokens
from kvrelay.errors import LeaseExpired, ModelError, TransferFailed
from kvrelay.sampler import Sampled
from kvrelay.scheduler.decode import PENDING, Admission, DecodeScheduler, DecodeSequence
from kvrelay.types import (
    BLOCK_SIZE,
    NO_HAND_OFF,
    FinishReason,
    HandOff,
    TicketId,
    TokenLogprobs,
    TransferTicket,
    num_blocks,
)
from kvrelay.wire import (
    Abort,
    Arrived,
    Filled,
    Filling,
    NewToken,
    Preempted,
    Reserve,
    Reserved,
    StepReport,
    WriterGone,
)
from kvrelay.worker.early import EarlySequences
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
        self._early = EarlySequences(parts)

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

    def on_notice(self, message: Filling | Arrived | Filled) -> None:
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

    def expire(self, now_s: float) -> None:
        """Give up tickets whose writer fell silent, and tell the others that their KV is still wanted."""
        self._early.renew(now_s)
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
            blocks = self._reserved[ticket.ticket_id].block_ids
            self._parts.store.refresh_stats(blocks[: num_blocks(ticket.num_tokens)], ticket.num_tokens)
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
            tokens += self._take(sequence, place, result)
        self._report(step.batch, tokens, start_s, step.cpu_s + time.process_time() - cpu_s)
        return len(step.batch)

    def _take(self, sequence: DecodeSequence, place: int, result: Sampled | Lacking | None) -> list[NewToken]:
        """What came of a step for one sequence, whose new token has that place; none if nothing did."""
        later = sequence.token_ids[place + 1 :]
        del sequence.token_ids[place:]
        match result:
            case None:
                self._fail_unsound(sequence)
            case Lacking():
                self._early.stall(sequence, result.tiles)
            case _:
                return [self._append(sequence, later, *result)]
        return []

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
                hand_off={s.request.request_id: s.hand_off for s in batch if s.hand_off != NO_HAND_OFF},
            )
        )
        for sequence in batch:
            sequence.hand_off = NO_HAND_OFF
