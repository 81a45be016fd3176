"""The control plane's messages: their names and shapes, not who sends them when (bytes: `codec`)."""

import msgspec

from kvrelay.sparse import AttentionUse
from kvrelay.types import (
    FinishReason,
    HandOff,
    KVLayout,
    LifeEvent,
    Phase,
    RequestId,
    RequestSpec,
    Role,
    TicketId,
    TokenLogprobs,
    TransferTicket,
    WorkerId,
)

MAX_CACHE_CHANGES = 4096


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of every control message; the tag on the wire is the class name."""


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How peers reach one worker's KV pages: the transport's own address beside the common layout."""

    worker_id: WorkerId
    epoch: int
    layout: KVLayout
    num_blocks: int
    keeps_stats: bool = False
    address: dict[str, str | int]


class Filling(Message, frozen=True, kw_only=True):
    """Prefill to decode: the writer is at work on the ticket, or still has it queued. Renews the lease."""

    ticket_id: TicketId


class Filled(Message, frozen=True, kw_only=True):
    """Prefill to decode: every write of the ticket is complete. `digests` is empty unless they are on."""

    ticket_id: TicketId
    layout_fingerprint: str
    num_tokens: int
    num_bytes: int
    digests: tuple[str, ...] = ()


class Arrived(Message, frozen=True, kw_only=True):
    """Prefill to decode: these tiles of the ticket have come, by layer (numbers: see `cache.arrivals`).

    The first such message has `may_start`: then all that has come by then is in it, and decode may start with
    that. `num_bytes` counts the tiles, statistics included. `digests`, by layer, is empty unless they are on.
    """

    ticket_id: TicketId
    layout_fingerprint: str
    may_start: bool
    tiles: dict[int, tuple[int, ...]]
    num_bytes: int
    digests: dict[int, str] = {}


Notification = Filling | Filled | Arrived  # the transport brings these, from worker to worker


class Wanted(Message, frozen=True, kw_only=True):
    """Decode to the ticket's writer, by way of the router: send these tiles first, by layer.

    Without tiles it only says that the sequence runs on and the rest is still wanted.
    """

    ticket_id: TicketId
    tiles: dict[int, tuple[int, ...]] = {}


class Connect(Message, frozen=True, kw_only=True):
    """Map the peer's pages and compare layouts; answered by `Connected`."""

    peer: Descriptor


class Reserve(Message, frozen=True, kw_only=True):
    """Reserve decode blocks for the request; answered by `Reserved` as soon as there is room."""

    request: RequestSpec


class Prefill(Message, frozen=True, kw_only=True):
    """Compute the request's KV and write it where the ticket says."""

    request: RequestSpec
    ticket: TransferTicket


class Abort(Message, frozen=True, kw_only=True):
    """Stop an attempt: on the decode side, or, with its `ticket`, on the prefill side.

    The prefill side always answers `WriterGone`, whether or not it still had the job.
    """

    request_id: RequestId
    attempt: int
    ticket: TransferTicket | None = None


class Shutdown(Message, frozen=True, kw_only=True):
    """Finish nothing, free everything, exit."""


class Hello(Message, frozen=True, kw_only=True):
    """A worker is loaded and listening."""

    worker_id: WorkerId
    pid: int
    role: Role
    device: str
    model_impl: str
    num_threads: int
    descriptor: Descriptor
    load_s: float


class StartFailed(Message, frozen=True, kw_only=True):
    """A worker could not start; `error` is a class name of `kvrelay.errors`."""

    worker_id: WorkerId
    error: str
    message: str


class Connected(Message, frozen=True, kw_only=True):
    """The handshake with one peer ended; `error` is empty when it succeeded."""

    worker_id: WorkerId
    peer: WorkerId
    error: str = ""


class Reserved(Message, frozen=True, kw_only=True):
    """Decode blocks are reserved; `ticket` is None when there is nothing to prefill.

    That is so for a one-token prompt, and where decode has the KV of all tokens that prefill would compute.
    """

    request_id: RequestId
    attempt: int
    ticket: TransferTicket | None
    at_s: float
    num_cached_tokens: int = 0


class Mark(Message, frozen=True, kw_only=True):
    """A point in a request's life, on the host's monotonic clock.

    `num_cached_tokens` goes with `prefill_started`: tokens whose KV prefill need not compute.
    """

    request_id: RequestId
    attempt: int
    event: LifeEvent
    at_s: float
    num_cached_tokens: int = 0


class NewToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One generated token; `finish_reason` is set on the last."""

    request_id: RequestId
    attempt: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


class PromptScored(Message, frozen=True, kw_only=True):
    """Log-probabilities of prompt tokens from index `start` on: prefill to router, in order, without gaps."""

    request_id: RequestId
    attempt: int
    start: int
    logprobs: tuple[TokenLogprobs, ...]


class StepReport(Message, frozen=True, kw_only=True):
    """What one engine step did: one phase, its time, and the tokens each request got from it.

    For the transfer phase `moved_bytes` and `moved_s` say what was copied for whom and how long it took, and
    a token counts once its last layer has left. `end_s - start_s` is time at work: gaps between writes are
    left out. `attention` says what each request's queries read, where the engine is not dense.
    `unfinished` has, of each prompt that goes on in a later step, the tokens whose KV is there. `hand_off`
    is what came of each request's KV since the last step that it was in, and how often it waited for some.
    """

    worker_id: WorkerId
    phase: Phase
    start_s: float
    end_s: float
    cpu_s: float
    num_tokens: dict[str, int]
    tokens: tuple[NewToken, ...] = ()
    moved_bytes: dict[str, int] = {}
    moved_s: dict[str, float] = {}
    attention: dict[str, AttentionUse] = {}
    unfinished: dict[str, int] = {}
    hand_off: dict[str, HandOff] = {}


class Preempted(Message, frozen=True, kw_only=True):
    """Decode needed the blocks; the attempt is over and its tokens so far stand."""

    request_id: RequestId
    attempt: int


class AttemptFailed(Message, frozen=True, kw_only=True):
    """The attempt ended in an error; `retryable` says whether another attempt may succeed."""

    request_id: RequestId
    attempt: int
    error: str
    message: str
    retryable: bool


class WriterGone(Message, frozen=True, kw_only=True):
    """The writer of a ticket can no longer write: worker to router, passed on to the decode worker."""

    ticket_id: TicketId
    decode_worker: WorkerId


class Heartbeat(Message, frozen=True, kw_only=True):
    """Everything the worker did up to `at_s` has been reported; and the state of its pool."""

    worker_id: WorkerId
    at_s: float
    num_free_blocks: int
    num_blocks: int
    num_running: int
    num_waiting: int
    num_tickets: int
    num_cached_blocks: int = 0  # of the free ones
    peak_blocks: int
    counters: dict[str, int]


class CacheChanged(Message, frozen=True, kw_only=True):
    """What a worker's prefix cache gained and lost since the last such message, as names of blocks.

    The names are those of `cache.prefix.block_hashes`. Sent with heartbeats, at most `MAX_CACHE_CHANGES`
    names at a time; no name is both, and what a later message says of one holds.
    """

    worker_id: WorkerId
    added: tuple[bytes, ...]
    removed: tuple[bytes, ...]


class Stopped(Message, frozen=True, kw_only=True):
    """The worker's last message: whether every block came home."""

    worker_id: WorkerId
    num_leaked_blocks: int
