"""Decode-side scheduler: admits reservations, chooses the next decode batch, preempts when the pool is full.

Knows block ids and token counts. Knows nothing about tensors, sockets or text.
"""

from bisect import insort
from dataclasses import dataclass

from kvrelay.cache.pool import BlockPool
from kvrelay.types import FinishReason, RequestId, RequestSpec, num_blocks


@dataclass(slots=True, eq=False)
class DecodeSequence:
    """A request whose prompt KV is in this worker's pages; `token_ids` grows by one each step."""

    request: RequestSpec
    block_ids: list[int]
    token_ids: list[int]
    started: bool = False

    @property
    def num_cached(self) -> int:
        """Tokens whose KV is in the pages; the last token is the next step's input."""
        return len(self.token_ids) - 1


class DecodeScheduler:
    """Waiting reservations and running sequences of one decode worker."""

    def __init__(self, pool: BlockPool, max_num_seqs: int) -> None:
        self._pool, self._max_num_seqs = pool, max_num_seqs
        self.waiting: list[RequestSpec] = []  # oldest first, as is `running`
        self.running: list[DecodeSequence] = []

    def reserve(self, request: RequestSpec) -> None:
        """Queue a request for blocks, by age: one that was preempted goes ahead of younger ones."""
        insort(self.waiting, request, key=lambda waiting: waiting.arrival)

    def admit(self, num_open_tickets: int) -> tuple[RequestSpec, list[int]] | None:
        """The oldest waiting request with the blocks for its tokens, once there is room for it.

        Each running sequence keeps one block in reserve to grow into; without others, all of the pool may go.
        """
        if not self.waiting:
            return None
        needed = num_blocks(len(self.waiting[0].token_ids))
        growth = len(self.running) + num_open_tickets
        if not self._pool.can_allocate(needed + growth) and not (
            growth == 0 and self._pool.can_allocate(needed)
        ):
            return None
        return self.waiting.pop(0), self._pool.allocate(needed)

    def run(self, sequence: DecodeSequence) -> None:
        """Add a committed sequence to the running ones, by age."""
        insort(self.running, sequence, key=lambda running: running.request.arrival)

    def plan(self) -> tuple[list[DecodeSequence], list[DecodeSequence]]:
        """The next batch and the sequences preempted to make room for it, oldest sequences first.

        A sequence that needs a block when none is free takes those of the youngest; the youngest of all
        is left out of the batch when it finds none (open tickets will become younger ones).
        """
        batch: list[DecodeSequence] = []
        preempted: list[DecodeSequence] = []
        position = 0
        while position < len(self.running) and len(batch) < self._max_num_seqs:
            sequence = self.running[position]
            position += 1
            while not self._grow(sequence) and self.running[-1] is not sequence:
                victim = self.running[-1]
                self.remove(victim)
                preempted.append(victim)
            if len(sequence.block_ids) >= num_blocks(len(sequence.token_ids)):
                batch.append(sequence)
        return batch, preempted

    def finish_reason(self, sequence: DecodeSequence, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the sequence ends after its newest token; None when it goes on."""
        params, token = sequence.request.params, sequence.token_ids[-1]
        num_output = len(sequence.token_ids) - sequence.request.num_prompt_tokens
        if num_output >= params.min_tokens:
            if token in params.stop_token_ids:
                return "stop"
            if token in eos_token_ids and not params.ignore_eos:
                return "stop"
        if num_output >= params.max_tokens or len(sequence.token_ids) >= sequence.request.max_total_tokens:
            return "length"
        return None

    def remove(self, sequence: DecodeSequence) -> None:
        """Forget a running sequence and free its blocks."""
        self.running.remove(sequence)
        self._pool.release(sequence.block_ids)

    def withdraw(self, request_id: RequestId, attempt: int) -> DecodeSequence | None:
        """Abort an attempt that waits or runs here; the running sequence, already removed."""
        wanted = (request_id, attempt)
        self.waiting = [r for r in self.waiting if (r.request_id, r.attempt) != wanted]
        for sequence in self.running:
            if (sequence.request.request_id, sequence.request.attempt) == wanted:
                self.remove(sequence)
                return sequence
        return None

    def _grow(self, sequence: DecodeSequence) -> bool:
        missing = num_blocks(len(sequence.token_ids)) - len(sequence.block_ids)
        if missing <= 0:
            return True
        if not self._pool.can_allocate(missing):
            return False
        sequence.block_ids += self._pool.allocate(missing)
        return True
