"""One request as the router sees it, from arrival to its one end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec
from msgspec.structs import replace

from kvrelay.errors import KVRelayError
from kvrelay.metrics import Ledger
from kvrelay.sampling_params import SamplingParams
from kvrelay.sparse import AttentionUse
from kvrelay.types import (
    NO_HAND_OFF,
    FinishReason,
    HandOff,
    RequestId,
    RequestSpec,
    TokenLogprobs,
    TransferTicket,
    WorkerId,
)
from kvrelay.wire import Abort, Mark, NewToken, StepReport

Operation = Literal["text_completion", "chat"]  # as the GenAI conventions name them


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What a request's owner is told: one token, or its end, or both. `error` ends it too.

    `num_prefilled` comes alone: so many tokens of a long prompt have been computed, and there are more.
    """

    request_id: RequestId
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: KVRelayError | None = None
    num_prefilled: int | None = None
    at_s: float


def update_of(token: NewToken, at_s: float) -> Update:
    """What the owner is told of a token."""
    return Update(
        request_id=token.request_id,
        token_id=token.token_id,
        logprobs=token.logprobs,
        finish_reason=token.finish_reason,
        at_s=at_s,
    )


@dataclass(slots=True, eq=False)
class RoutedRequest:
    """The router's record; `token_ids` is the prompt and every token delivered so far.

    An attempt is one pass through one pair of workers. `ticket` is set from `Reserved` to the KV's arrival,
    `is_committed` once decode has the KV. A request that has not
    begun (no worker has computed anything for it) by `deadline_s` is given up. `attention` is, by phase, what
    all attempts together have read. `prompt_logprobs` grows as prefill scores the prompt (the first token has
    nothing before it); tokens that overtake it are `held`. KV of the first `num_cached_tokens` of the prompt
    was in a cache when the first prefill began. Of a prompt that takes several steps, `num_prefilled` tokens
    are computed in this attempt.
    """

    request_id: RequestId
    arrival: int
    params: SamplingParams
    seed: int
    token_ids: list[int]
    num_prompt_tokens: int
    max_total_tokens: int
    ledger: Ledger = field(default_factory=Ledger)
    attempt: int = 0
    attempt_tokens: int = 0
    num_failures: int = 0
    num_deaths: int = 0
    prefill: WorkerId | None = None
    decode: WorkerId | None = None
    ticket: TransferTicket | None = None
    num_cached_tokens: int | None = None
    num_prefilled: int = 0
    is_prefilled: bool = False
    is_committed: bool = False
    has_started_early: bool = False  # decode, on part of the KV
    deadline_s: float | None = None
    has_begun: bool = False
    last_error: KVRelayError | None = None
    avoid: WorkerId | None = None  # the next attempt goes elsewhere, if there is an elsewhere
    reserved_at_s: float = 0.0  # when decode was asked for blocks
    num_blocks_held: int = 0  # decode blocks that the router counts for it
    num_blocks_shared: int = 0  # those that decode had cached when the attempt began: not counted
    traceparent: str | None = None  # of the caller's span (W3C trace context)
    operation: Operation = "text_completion"
    last_pair: tuple[WorkerId, WorkerId] | None = None  # where the last attempt went
    pinned: tuple[WorkerId, WorkerId] | None = None  # the only pair that may serve it
    attention: dict[str, AttentionUse] = field(default_factory=dict)
    hand_off: HandOff = NO_HAND_OFF
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    held: list[NewToken] = field(default_factory=list)
    block_names: Sequence[bytes] = ()  # of the full blocks of its first `num_named` tokens
    num_named: int = 0

    @property
    def is_counted(self) -> bool:
        """Whether it is a user's; requests of our own have their pair given."""
        return self.pinned is None

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens whose KV the next attempt computes: all but the last."""
        return len(self.token_ids) - 1

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether prefill still has to score prompt tokens."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens

    def is_on(self, worker_id: WorkerId) -> bool:
        """Whether the attempt still needs this worker."""
        is_with_decode = self.is_committed and not self.owes_prompt_logprobs
        return self.decode == worker_id or (self.prefill == worker_id and not is_with_decode)

    def on_step(self, step: StepReport) -> None:
        """Count what the request's queries read in a step, and how long its KV was copied."""
        use = step.attention.get(self.request_id)
        if use is not None:
            self.attention[step.phase] = self.attention.get(step.phase, AttentionUse()) + use
        self.hand_off += step.hand_off.get(self.request_id, HandOff())
        self.ledger.transfer_s += step.moved_s.get(self.request_id, 0.0)

    def spec(self) -> RequestSpec:
        """What workers are told of the current attempt."""
        return RequestSpec(
            request_id=self.request_id,
            attempt=self.attempt,
            arrival=self.arrival,
            token_ids=tuple(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            max_total_tokens=self.max_total_tokens,
            params=self.params,
            seed=self.seed,
            prompt_logprobs=self.params.prompt_logprobs if self.owes_prompt_logprobs else None,
        )

    def aborts(self) -> list[tuple[WorkerId, Abort]]:
        """Who must be told to stop the attempt, and what.

        Decode keeps the ticket's blocks until the writer has said that it is gone.
        """
        abort = Abort(request_id=self.request_id, attempt=self.attempt)
        found = [] if self.decode is None else [(self.decode, abort)]
        if self.ticket is not None and not self.is_committed and self.prefill is not None:
            found.append((self.prefill, replace(abort, ticket=self.ticket)))
        return found

    def on_mark(self, mark: Mark) -> None:
        """A worker did something for the current attempt."""
        self.has_begun = True
        if mark.event != "kv_committed" or not self.has_started_early:
            self.ledger.add(mark.event, mark.at_s)
        self.has_started_early |= mark.event == "kv_usable"
        if mark.event == "prefill_started":
            self.note_cached(mark.num_cached_tokens)

    def note_cached(self, num_tokens: int) -> None:
        """A prefill begins, or is not needed: so many tokens were cached. The first attempt counts."""
        if self.num_cached_tokens is None:
            self.num_cached_tokens = min(num_tokens, self.num_prompt_tokens)

    def begin_attempt(self, prefill: WorkerId, decode: WorkerId) -> None:
        """Forget the last attempt and start the next on this pair."""
        self.attempt += 1
        self.attempt_tokens = len(self.token_ids)
        self.prefill, self.decode, self.ticket = prefill, decode, None
        self.is_prefilled = self.is_committed = self.has_started_early = False
        self.held.clear()
        if self.owes_prompt_logprobs:
            del self.prompt_logprobs[1:]


class Observer(Protocol):
    """Who is told what becomes of requests, where it happens."""

    def on_reserved(self, request: RoutedRequest, waited_s: float) -> None:
        """Decode answered a reservation."""

    def on_token(self, request: RoutedRequest) -> None:
        """A token was delivered: the last of `request.ledger.token_times_s`."""

    def on_attempt_failed(self, error: KVRelayError) -> None:
        """A worker gave an attempt up; the request may go on elsewhere."""

    def on_end(self, request: RoutedRequest, update: Update) -> None:
        """The request ended with this update."""
