"""Decode-side scheduler: admits reservations, chooses the next decode batch, preempts when the pool is full.

Requests come by rank: lower priority numbers first, then older ones. Knows block ids, names of contents and
token counts. Knows nothing about tensors, sockets or text.
"""

from bisect import insort
from dataclasses import dataclass

from kvrelay.cache.arrivals import Arrivals
from kvrelay.cache.pool import BlockPool
from kvrelay.cache.prefix import NO_PREFIXES, Prefixes
from kvrelay.types import BLOCK_SIZE, NO_HAND_OFF, FinishReason, HandOff, RequestId, RequestSpec, num_blocks

PENDING = -1  # stands for a token that a step computes and the host does not know yet


@dataclass(frozen=True, slots=True)
class Reservation:
    """A request that waits for blocks, and the names of the full blocks that prefill would fill for it."""

    request: RequestSpec
    names: list[bytes]


@dataclass(frozen=True, slots=True)
class Admission:
    """A reservation with its blocks, of which those of the first `num_cached_tokens` are full already."""

    request: RequestSpec
    names: list[bytes]
    block_ids: list[int]
    num_cached_tokens: int


@dataclass(slots=True, eq=False)
class DecodeSequence:
    """A request whose prompt KV is in this worker's pages; `token_ids` grows by one each step.

    The newest may be `PENDING`: the step that computes it is under way.
    """

    request: RequestSpec
    block_ids: list[int]
    token_ids: list[int]
    started: bool = False
    arrivals: Arrivals | None = None  # what has yet to come of the prompt's KV; None: nothing
    hand_off: HandOff = NO_HAND_OFF  # how that came, since it was last reported

    @property
    def num_cached(self) -> int:
        """Tokens whose KV is in the pages; the last token is the next step's input."""
        return len(self.token_ids) - 1


class DecodeScheduler:
    """Waiting reservations and running sequences of one decode worker."""

    def __init__(self, pool: BlockPool, max_num_seqs: int, prefixes: Prefixes = NO_PREFIXES) -> None:
        self._pool, self._max_num_seqs, self._prefixes = pool, max_num_seqs, prefixes
        self.waiting: list[Reservation] = []  # by rank, as is `running`
        self.running: list[DecodeSequence] = []

    def reserve(self, request: RequestSpec) -> None:
        """Queue a request for blocks, by rank: one that was preempted goes ahead of younger ones."""
        names = self._prefixes.names_of(request)
        insort(self.waiting, Reservation(request, names), key=lambda waiting: waiting.request.rank)

    def admit(self, num_open_tickets: int) -> Admission | None:
        """The first waiting request with the blocks for its tokens, once there is room for it.

        Blocks that are cached are shared. Each running sequence keeps one block in reserve to grow into;
        without others, all of the pool may go.
        """
        if not self.waiting:
            return None
        request, names = self.waiting[0].request, self.waiting[0].names
        multiple = self._prefixes.unit_tokens // BLOCK_SIZE
        cached = self._pool.find(names, multiple)
        needed = num_blocks(len(request.token_ids)) - len(cached)
        growth = len(self.running) + num_open_tickets
        if not self._pool.can_allocate(needed + growth, cached) and not (
            growth == 0 and self._pool.can_allocate(needed, cached)
        ):
            return None
        self.waiting.pop(0)
        block_ids, num_full = self._pool.take(names, len(cached) + needed, multiple)
        return Admission(request, names, block_ids, num_full * BLOCK_SIZE)

    def run(self, sequence: DecodeSequence) -> None:
        """Add a committed sequence to the running ones, by rank."""
        insort(self.running, sequence, key=lambda running: running.request.rank)

    def plan(self) -> tuple[list[DecodeSequence], list[DecodeSequence]]:
        """The next batch and the sequences preempted to make room for it, both by rank.

        A sequence that needs a block when none is free takes those of the last in rank; the last of all
        is left out of the batch when it finds none (open tickets will become younger ones). So is one whose
        newest token, pending or not, is the last it may have. Those whose KV has not all come have no blocks
        to give, and are left out while they wait for some.
        """
        batch: list[DecodeSequence] = []
        preempted: list[DecodeSequence] = []
        position = 0
        while position < len(self.running) and len(batch) < self._max_num_seqs:
            sequence = self.running[position]
            position += 1
            if self._is_full(sequence) or (sequence.arrivals is not None and sequence.arrivals.is_stalled):
                continue
            while not self._grow(sequence) and (victims := self._whole(self.running[position:])):
                self.remove(victims[-1])
                preempted.append(victims[-1])
            if len(sequence.block_ids) >= num_blocks(len(sequence.token_ids)):
                batch.append(sequence)
        return batch, preempted

    def finish_reason(self, sequence: DecodeSequence, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the sequence ends after its newest token; None when it goes on."""
        params, token = sequence.request.params, sequence.token_ids[-1]
        if len(sequence.token_ids) - sequence.request.num_prompt_tokens >= params.min_tokens:
            if token in params.stop_token_ids:
                return "stop"
            if token in eos_token_ids and not params.ignore_eos:
                return "stop"
        return "length" if self._is_full(sequence) else None

    def remove(self, sequence: DecodeSequence, *, is_sound: bool = True) -> None:
        """Forget a running sequence and free its blocks; those that are full and `is_sound` can be found."""
        self.running.remove(sequence)
        if is_sound and sequence.arrivals is None:
            request, token_ids = sequence.request, sequence.token_ids[: sequence.num_cached]
            names = self._prefixes.names(request.params, token_ids, request.num_prompt_tokens)
            self._pool.publish(sequence.block_ids[: len(names)], names)
        self._pool.release(sequence.block_ids)

    def withdraw(self, request_id: RequestId, attempt: int) -> DecodeSequence | None:
        """Abort an attempt that waits or runs here; the running sequence, already removed."""
        wanted = (request_id, attempt)
        self.waiting = [w for w in self.waiting if (w.request.request_id, w.request.attempt) != wanted]
        for sequence in self.running:
            if (sequence.request.request_id, sequence.request.attempt) == wanted:
                self.remove(sequence)
                return sequence
        return None

    def _is_full(self, sequence: DecodeSequence) -> bool:
        request, num_tokens = sequence.request, len(sequence.token_ids)
        most = min(request.num_prompt_tokens + request.params.max_tokens, request.max_total_tokens)
        return num_tokens >= most

    def _whole(self, sequences: list[DecodeSequence]) -> list[DecodeSequence]:
        return [sequence for sequence in sequences if sequence.arrivals is None]

    def _grow(self, sequence: DecodeSequence) -> bool:
        missing = num_blocks(len(sequence.token_ids)) - len(sequence.block_ids)
        if missing <= 0:
            return True
        if not self._pool.can_allocate(missing):
            return False
        sequence.block_ids += self._pool.allocate(missing)
        return True
