"""The prefill side: computes prompts chunk by chunk and relays each layer's KV while the next is computed."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from kvrelay.errors import LeaseExpired, TransferFailed, TransportError
from kvrelay.scheduler.prefill import Chunk, PrefillJob, PrefillScheduler
from kvrelay.sparse import starts_early
from kvrelay.transport.base import WriteDone, WriteFailed
from kvrelay.types import BLOCK_SIZE, TransferTicket, num_blocks
from kvrelay.wire import (
    Abort,
    Arrived,
    Filled,
    Filling,
    Prefill,
    PromptScored,
    StepReport,
    Wanted,
    WriterGone,
)
from kvrelay.worker.decode import DecodeSide
from kvrelay.worker.parts import WorkerParts
from kvrelay.worker.relay import Relay


class PrefillSide:
    """Fills tickets: those of other workers over the transport, those of `decode` beside it in place."""

    def __init__(self, parts: WorkerParts, decode: DecodeSide) -> None:
        self._parts, self._decode, self._relay = parts, decode, Relay(parts)
        chunk_tokens = parts.config.engine.prefill_chunk_tokens
        self._scheduler = PrefillScheduler(parts.pool, chunk_tokens, parts.prefixes)
        self._next_renewal_s = 0.0

    def __len__(self) -> int:
        return len(self._scheduler)

    def start(self, message: Prefill) -> None:
        """Queue a prompt."""
        ticket = message.ticket
        if ticket.decode_worker != self._parts.config.worker_id:
            job = PrefillJob(message.request, ticket, is_local=False)
            if self._parts.config.engine.kv_handoff == "sparse":
                sparse = self._parts.runner.sparse_of(message.request)
                if starts_early(sparse, job.num_tokens) and self._relay.can_tell(job):
                    job.early = sparse
            self._scheduler.add(job)
            return
        blocks = self._decode.tickets.blocks(ticket.ticket_id)
        if blocks is None:
            self._say_gone(ticket)  # closed before it came here
        else:
            self._scheduler.add(PrefillJob(message.request, ticket, is_local=True, block_ids=blocks))

    def abort(self, message: Abort) -> None:
        """Stop writing to the ticket, whether or not its job is still here, and say so."""
        assert message.ticket is not None
        job = self._scheduler.get(message.ticket.ticket_id)
        self._parts.transport.cancel(message.ticket.ticket_id)
        if job is not None:
            self._scheduler.remove(job)
        self._say_gone(message.ticket)

    def on_wanted(self, message: Wanted) -> None:
        """Decode runs on what it has: it wants these tiles first, and the rest still."""
        job = self._scheduler.get(message.ticket_id)
        if job is not None and job.holds_until_s is not None:
            job.holds_until_s = time.monotonic() + self._parts.config.engine.lease_s
            self._relay.hurry(job, message.tiles)

    def step(self, num_decoded: int = 0) -> bool:
        """Compute the next chunks, after `num_decoded` tokens of decode; False when nothing was done."""
        chunks, begun = self._scheduler.plan(num_decoded)
        for job in begun:
            self._begin(job)
        if not chunks:
            return bool(begun)
        start_s, cpu_s = time.monotonic(), time.process_time()
        try:
            hidden = self._parts.runner.prefill(chunks, lambda layer: self._relay_layer(chunks, layer))
            self._score(chunks, hidden)
        except RuntimeError as error:  # torch's, out of memory included
            for chunk in chunks:
                self._drop(chunk.job)
            self._parts.fail_step([chunk.job.request for chunk in chunks], error)
            for chunk in chunks:
                self._say_gone(chunk.job.ticket)
            return True
        end_s = time.monotonic()
        for chunk, watched in zip(chunks, self._parts.runner.watched, strict=True):
            chunk.job.foreseen = watched
            self._scheduler.advance(chunk)
        self._report(chunks, start_s, end_s, time.process_time() - cpu_s)
        for chunk in chunks:
            if chunk.job.is_computed:
                self._end(chunk.job, end_s)
        return True

    def on_writes_done(self, events: Sequence[WriteDone]) -> None:
        """Count completed writes; a job whose last write this was is handed over."""
        if not events:
            return
        moved_bytes: Counter[str] = Counter()
        moved_s: defaultdict[str, float] = defaultdict(float)
        num_tokens: Counter[str] = Counter()
        for event in events:
            job = self._scheduler.get(event.write.ticket_id)
            if job is None:
                continue
            num_tokens[job.request.request_id] += self._relay.count(job, event)
            moved_bytes[job.request.request_id] += event.num_bytes
            moved_s[job.request.request_id] += event.end_s - event.start_s
        start_s = events[0].start_s
        self._parts.send(
            StepReport(
                worker_id=self._parts.config.worker_id,
                phase="transfer",
                start_s=start_s,
                end_s=start_s + sum(event.end_s - event.start_s for event in events),
                cpu_s=sum(event.cpu_s for event in events),
                num_tokens=dict(+num_tokens),
                moved_bytes=dict(moved_bytes),
                moved_s=dict(moved_s),
            )
        )
        for job in list(self._scheduler):
            self._tell(job)

    def on_write_failed(self, event: WriteFailed) -> None:
        """Give the attempt up: part of its KV did not leave."""
        job = self._scheduler.get(event.write.ticket_id)
        if job is not None:
            self._give_up(job, TransferFailed(f"writing KV to {event.write.peer} failed: {event.reason}"))

    def renew(self, now_s: float) -> None:
        """Keep the leases of all tickets held here alive, four times per lease.

        Those of the decode side beside it at every call: it cannot hear of them while this side works, nor
        tell its own writers that it still wants what they hold.
        """
        self._decode.renew(now_s)
        for job in self._scheduler:
            if job.is_local:
                self._decode.on_notice(Filling(ticket_id=job.ticket.ticket_id))
        if now_s < self._next_renewal_s:
            return
        lease_s = self._parts.config.engine.lease_s
        self._next_renewal_s = now_s + lease_s / 4
        for job in self._scheduler:
            if job.is_local:
                continue
            try:
                message = Filling(ticket_id=job.ticket.ticket_id)
                self._parts.transport.notify(job.ticket.decode_worker, message)
            except TransportError:
                continue  # the lease will tell

    def give_up_hung(self, now_s: float) -> None:
        """Fail the attempts whose writes, or whose running sequence, gave no sign for a whole lease."""
        lease_s = self._parts.config.engine.lease_s
        moved_s = max((job.completed_s for job in self._scheduler), default=0.0)
        for job in list(self._scheduler):
            if job.holds_until_s is not None and now_s > job.holds_until_s:
                reason = f"{job.request.request_id}: decode was silent for {lease_s:g} s"
                self._give_up(job, LeaseExpired(reason))
                continue
            waited_s = now_s - max(job.last_write_s, moved_s)  # writes leave in order, whoever's they are
            if job.num_outstanding_writes and waited_s > lease_s:
                reason = f"{job.num_outstanding_writes} KV writes did not complete within {lease_s:g} s"
                self._give_up(job, TransferFailed(f"{job.request.request_id}: {reason}"))

    def reported_until(self, now_s: float) -> float:
        """The time before which every write that began has been reported."""
        return min([now_s, *(job.unreported_s for job in self._scheduler if job.num_outstanding_writes)])

    def close(self) -> None:
        """Drop every job."""
        for job in list(self._scheduler):
            self._drop(job)

    def _begin(self, job: PrefillJob) -> None:
        """Say so, and send at once what decode lacks and this worker has."""
        now_s = time.monotonic()
        if job.is_local:  # counted at its admission; others' KV may have become full since
            self._parts.count_cached(0, job.num_cached - job.ticket.num_cached_tokens)
        else:
            self._parts.count_cached(job.num_tokens, job.num_cached)
        self._parts.mark(job.request, "prefill_started", now_s, num_cached_tokens=job.num_cached)
        cached = range(job.num_cached // BLOCK_SIZE)
        if job.early is not None:
            self._relay.send_statistics(job, cached)
        for layer in range(self._parts.store.layout.num_layers):
            self._relay.send(job, layer, cached)
        if job.early is not None:
            self._relay.hurry_forced(job, job.early, cached)
        if job.is_computed:
            self._end(job, now_s)

    def _end(self, job: PrefillJob, at_s: float) -> None:
        self._parts.mark(job.request, "prefill_finished", at_s)
        if job.early is not None and job.outstanding:
            computed = range(job.num_cached // BLOCK_SIZE, num_blocks(job.num_tokens))
            self._relay.send_statistics(job, computed)
            self._relay.hurry_forced(job, job.early, computed)
            self._relay.hurry(job, job.foreseen)
        self._tell(job)

    def _relay_layer(self, chunks: Sequence[Chunk], layer: int) -> None:
        self.renew(time.monotonic())  # one step may outlast a lease
        for chunk in chunks:
            self._relay.send(chunk.job, layer, chunk.pages)

    def _score(self, chunks: Sequence[Chunk], hidden: torch.Tensor) -> None:
        """Send the log-probabilities of prompts that are to be scored, slice by slice."""
        first = 0
        for chunk in chunks:
            rows, request = slice(first, first + chunk.length), chunk.job.request
            first += chunk.length
            if request.prompt_logprobs is None:
                continue
            for start, logprobs in self._parts.runner.score(chunk, hidden[rows]):
                self._parts.send(
                    PromptScored(
                        request_id=request.request_id,
                        attempt=request.attempt,
                        start=start,
                        logprobs=tuple(logprobs),
                    )
                )
                self.renew(time.monotonic())

    def _tell(self, job: PrefillJob) -> None:
        """Tell decode that the job is done, or what of it has come so far where it may start with that."""
        if job.is_computed and job.num_outstanding_writes and (news := self._relay.tell(job)):
            self._notify(job, news)
        self._finish_if_done(job)

    def _finish_if_done(self, job: PrefillJob) -> None:
        if not job.is_computed or job.num_outstanding_writes:
            return
        if job.is_local:
            self._scheduler.remove(job)
            self._decode.commit_local(job.ticket.ticket_id)
            return
        digests: tuple[str, ...] = ()
        if self._parts.config.engine.verify_kv:
            digests = self._parts.store.digests(job.block_ids[job.first_page :])
        filled = Filled(
            ticket_id=job.ticket.ticket_id,
            layout_fingerprint=self._parts.store.layout.fingerprint(),
            num_tokens=job.num_tokens,
            num_bytes=job.num_bytes_written,
            digests=digests,
        )
        if self._notify(job, filled):
            self._scheduler.remove(job)

    def _notify(self, job: PrefillJob, message: Filled | Arrived) -> bool:
        try:
            self._parts.transport.notify(job.ticket.decode_worker, message)
        except TransportError as error:
            self._give_up(job, error)
            return False
        return True

    def _drop(self, job: PrefillJob) -> None:
        self._parts.transport.cancel(job.ticket.ticket_id)
        self._scheduler.remove(job)

    def _give_up(self, job: PrefillJob, error: Exception) -> None:
        self._drop(job)
        self._parts.fail(job.request, error, retryable=True)
        self._say_gone(job.ticket)

    def _say_gone(self, ticket: TransferTicket) -> None:
        gone = WriterGone(ticket_id=ticket.ticket_id, decode_worker=ticket.decode_worker)
        self._parts.send(gone)

    def _report(self, chunks: Sequence[Chunk], start_s: float, end_s: float, cpu_s: float) -> None:
        jobs = [chunk.job for chunk in chunks]
        self._parts.send(
            StepReport(
                worker_id=self._parts.config.worker_id,
                phase="prefill",
                start_s=start_s,
                end_s=end_s,
                cpu_s=cpu_s,
                num_tokens={chunk.job.request.request_id: chunk.length for chunk in chunks},
                attention=self._parts.runner.attention_by([chunk.job.request for chunk in chunks]),
                unfinished={job.request.request_id: job.num_computed for job in jobs if not job.is_computed},
            )
        )
