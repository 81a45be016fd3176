"""One request as the router sees it, from arrival to its one end."""

from dataclasses import dataclass, field

import msgspec

from kvrelay.errors import KVRelayError
from kvrelay.metrics import Ledger
from kvrelay.types import (
    FinishReason,
    RequestId,
    RequestSpec,
    SamplingParams,
    TokenLogprobs,
    TransferTicket,
    WorkerId,
)


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What a request's owner is told: one token, or its end, or both. `error` ends it too."""

    request_id: RequestId
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: KVRelayError | None = None
    at_s: float


@dataclass(slots=True, eq=False)
class RoutedRequest:
    """The router's record; `token_ids` is the prompt and every token delivered so far.

    An attempt is one pass through one pair of workers. `ticket` is set from `Reserved` to the KV's arrival,
    `is_dispatched` once prefill may write, `is_committed` once decode has the KV.
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
    is_dispatched: bool = False
    is_prefilled: bool = False
    is_committed: bool = False

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
        )

    def begin_attempt(self, prefill: WorkerId, decode: WorkerId) -> None:
        """Forget the last attempt and start the next on this pair."""
        self.attempt += 1
        self.attempt_tokens = len(self.token_ids)
        self.prefill, self.decode, self.ticket = prefill, decode, None
        self.is_dispatched = self.is_prefilled = self.is_committed = False
