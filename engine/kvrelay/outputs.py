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
            num_prefilled=request.num_prefilled,
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
        request = self.request
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


class StopString:
    """How much of one stop string the text ends with, character by character.

    Knuth, Morris and Pratt (1977): every character is looked at once, however the text repeats itself. The
    table of borders grows no further than the text has come.
    """

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._borders = [0]  # of `stop[: i + 1]`: how much of its end it begins with, all of it left aside
        self.num_matched = 0

    def push(self, text: str) -> int | None:
        """Where in `text`, which follows all before it, the stop string begins that ends there first.

        That may be before it: negative. None when none ends there.
        """
        for end, character in enumerate(text, 1):
            self.num_matched = self._longer(self.num_matched, character)
            if self.num_matched == len(self._stop):
                return end - self.num_matched
            if self.num_matched > len(self._borders):
                last = self._stop[self.num_matched - 1]
                self._borders.append(self._longer(self._borders[-1], last))
        return None

    def _longer(self, count: int, character: str) -> int:
        """How much the text ends with after `character`, if it was `count` before."""
        while count and self._stop[count] != character:
            count = self._borders[count - 1]
        return count + (self._stop[count] == character)


class Detokenizer:
    """Tokens to text as they come, cut before the first stop string.

    Text that may yet turn out to be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], stop: tuple[str, ...]) -> None:
        self._stream = tokenizer.stream(prompt_token_ids)
        self._stops = [StopString(one) for one in stop]
        self._num_emitted = 0
        self.text = ""
        self.is_stopped = False

    def push(self, token_ids: list[int], *, is_last: bool, may_stop: bool = True) -> str:
        """Text that is certain now and was not before. What comes while `may_stop` is False never stops."""
        if self.is_stopped:
            return ""
        num_before = len(self.text)
        new = self._stream.push(token_ids) + (self._stream.flush() if is_last else "")
        self.text += new
        if may_stop:
            begins = [begin for stop in self._stops if (begin := stop.push(new)) is not None]
            if begins:
                self.text, self.is_stopped = self.text[: num_before + min(begins)], True
        held = 0 if is_last or self.is_stopped else max((s.num_matched for s in self._stops), default=0)
        end = len(self.text) - held
        piece, self._num_emitted = self.text[self._num_emitted : end], max(end, self._num_emitted)
        return piece
