"""What a caller gets back: streamed pieces and finished outputs, and how tokens become them.

Knows text and stop strings. Knows nothing of workers, sockets or tensors.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from kvrelay.energy import RequestEnergy
from kvrelay.errors import KVRelayError
from kvrelay.metrics import Timings
from kvrelay.models.tokenizer import Tokenizer
from kvrelay.router.request import RoutedRequest, Update
from kvrelay.sparse import AttentionUse, SparseAttention
from kvrelay.types import FinishReason, HandOff, RequestId, TokenLogprobs, WorkerId

logger = logging.getLogger("kvrelay")
PROGRESS_S = 5.0  # a prompt that takes longer is in the log, so often


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One finished request. `text` ends before a stop string; `token_ids` holds every generated token.
    KV of the first `num_cached_tokens` of the prompt was found in a cache, not computed.

    `prompt_logprobs` has an entry for each prompt token, None for the first, which has nothing before it.
    `energy` is what the meter had seen by then; its parts are None where nobody measured. `attention` says
    what the request's queries read, by phase; it is empty where the engine is dense. `sparse` are the
    settings that they selected by, None where they did not. `hand_off` says what came over the transport
    before the first token and in all, and how often decode waited for some of it."""

    request_id: RequestId
    prompt: str | None
    prompt_token_ids: list[int]
    num_cached_tokens: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    timings: Timings
    energy: RequestEnergy
    attention: dict[str, AttentionUse] = {}
    sparse: SparseAttention | None = None
    hand_off: HandOff = HandOff()


class InFlight(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has not ended: its age and the part of its ledger that it is in.

    `num_prefilled` of its prompt tokens are computed; 0 until the first step of several has ended.
    """

    request_id: RequestId
    part: str
    age_s: float
    num_prompt_tokens: int
    num_prefilled: int
    num_output_tokens: int
    prefill: WorkerId | None
    decode: WorkerId | None


class StreamEvent(msgspec.Struct, frozen=True, kw_only=True):
    """News of one request: new text and tokens; `output` on its end, `error` when it failed.

    `logprobs` are those of `token_ids`, when the request asked for them; `prompt_logprobs` come with the
    first tokens. While a long prompt is computed in several steps, events with nothing but `num_prefilled`
    say how many of its tokens are done."""

    request_id: RequestId
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_prefilled: int | None = None
    output: RequestOutput | None = None
    error: KVRelayError | None = None


@dataclass(slots=True, eq=False)
class OutputStream:
    """One request on the caller's side: tokens in, `StreamEvent`s out through `on_event`."""

    request: RoutedRequest
    prompt: str | None
    on_event: Callable[[StreamEvent], None]
    energy: Callable[[RequestId], RequestEnergy]
    detokenizer: "Detokenizer"
    logprobs: list[TokenLogprobs]
    sparse: SparseAttention | None = None
    num_prefilled: int = 0
    logged_s: float = 0.0

    @property
    def token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.request.token_ids[self.request.num_prompt_tokens :]

    def look(self, now_s: float) -> InFlight:
        """Where the request stands."""
        request = self.request
        return InFlight(
            request_id=request.request_id,
            part=request.ledger.part(),
            age_s=now_s - request.ledger.arrived_s,
            num_prompt_tokens=request.num_prompt_tokens,
            num_prefilled=self.num_prefilled,
            num_output_tokens=len(request.token_ids) - request.num_prompt_tokens,
            prefill=request.prefill,
            decode=request.decode,
        )

    def on_update(self, update: Update) -> bool:
        """Pass one update on; True when a stop string was found, so that the request must be ended.

        After the end nothing more is passed on.
        """
        if update.error is not None:
            self.on_event(StreamEvent(request_id=update.request_id, error=update.error))
            return False
        if update.num_prefilled is not None:
            self._tell_progress(update.num_prefilled, update.at_s)
            return False
        tokens = [] if update.token_id is None else [update.token_id]
        logprobs = [] if update.logprobs is None else [update.logprobs]
        self.logprobs += logprobs
        num_tokens = len(self.request.token_ids) - self.request.num_prompt_tokens
        text = self.detokenizer.push(
            tokens,
            is_last=update.finish_reason is not None,
            may_stop=num_tokens > self.request.params.min_tokens,
        )
        is_to_stop = self.detokenizer.is_stopped and update.finish_reason is None
        reason: FinishReason | None = "stop" if self.detokenizer.is_stopped else update.finish_reason
        output = None if is_to_stop or reason is None else self._output(reason, update.at_s)
        self.on_event(
            StreamEvent(
                request_id=update.request_id,
                text=text,
                token_ids=tokens,
                logprobs=logprobs,
                prompt_logprobs=self._prompt_logprobs() if num_tokens == 1 else None,
                output=output,
            )
        )
        return is_to_stop

    def _prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        return None if self.request.params.prompt_logprobs is None else self.request.prompt_logprobs

    def _tell_progress(self, num_prefilled: int, at_s: float) -> None:
        request, self.num_prefilled = self.request, num_prefilled
        if at_s - max(request.ledger.arrived_s, self.logged_s) >= PROGRESS_S:
            self.logged_s = at_s
            told = (request.request_id, num_prefilled, request.num_prompt_tokens)
            logger.info("%s: %d of %d prompt tokens computed", *told)
        self.on_event(StreamEvent(request_id=request.request_id, num_prefilled=num_prefilled))

    def _output(self, reason: FinishReason, end_s: float) -> RequestOutput:
        request = self.request
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.prompt,
            prompt_token_ids=request.token_ids[: request.num_prompt_tokens],
            num_cached_tokens=request.num_cached_tokens or 0,
            text=self.detokenizer.text,
            token_ids=self.token_ids,
            finish_reason=reason,
            logprobs=None if request.params.logprobs is None else self.logprobs,
            prompt_logprobs=self._prompt_logprobs(),
            timings=request.ledger.timings(end_s),
            energy=self.energy(request.request_id),
            attention=dict(request.attention),
            sparse=self.sparse,
            hand_off=request.hand_off,
        )


class Detokenizer:
    """Tokens to text as they come, cut before the first stop string.

    Text that may yet turn out to be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], stop: tuple[str, ...]) -> None:
        self._stream = tokenizer.stream(prompt_token_ids)
        self._stop = stop
        self._num_emitted = 0
        self._search_from = 0
        self.text = ""
        self.is_stopped = False

    def push(self, token_ids: list[int], *, is_last: bool, may_stop: bool = True) -> str:
        """Text that is certain now and was not before. What comes while `may_stop` is False never stops."""
        if self.is_stopped:
            return ""
        longest = max(map(len, self._stop), default=0)
        search_from = max(self._search_from, len(self.text) - longest)
        self.text += self._stream.push(token_ids) + (self._stream.flush() if is_last else "")
        if not may_stop:
            self._search_from = search_from = len(self.text)
        found = [at for stop in self._stop if (at := self.text.find(stop, search_from)) >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True
        end = len(self.text) if is_last or self.is_stopped else len(self.text) - self._num_undecided()
        piece, self._num_emitted = self.text[self._num_emitted : end], max(end, self._num_emitted)
        return piece

    def _num_undecided(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max((self._num_begun(stop) for stop in self._stop), default=0)

    def _num_begun(self, stop: str) -> int:
        at = self.text.find(stop[0], max(0, len(self.text) - len(stop) + 1))
        while at >= 0 and not stop.startswith(self.text[at:]):
            at = self.text.find(stop[0], at + 1)
        return 0 if at < 0 else len(self.text) - at
