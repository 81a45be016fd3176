"""From a client's document to the engine's requests: prompts, sampling parameters, limits.

Everything that can be refused is refused here, before anything is submitted.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import msgspec

from kvrelay.engine import Engine, Prepared
from kvrelay.errors import ContextLengthExceeded, InvalidRequest, ModelError
from kvrelay.sampling_params import SamplingParams
from kvrelay.server.requests import ChatMessage, ChatRequest, CompletionRequest, Sampling

MAX_REQUESTS = 1024  # prompts x n of one HTTP request
LARGE_TEXT = 16_384  # characters from which tokenising leaves the loop
MAX_LOGPROB_ENTRIES = 2**22  # of one HTTP request: tokens x log-probabilities of each
_SAME_NAME = (
    *("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "logit_bias", "priority"),
    *("cache_salt", "attention"),
)
Prompt = str | list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one HTTP request asks of the engine: `prepared` has `n` requests for each prompt, in order."""

    prompts: list[Prompt]
    prepared: list[Prepared]
    n: int
    is_prompt_only: bool = False  # `max_tokens: 0`: one token is computed, and not shown
    with_measured: bool = False  # ledger and joules go with the answer

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(request.token_ids) for request in self.prepared[:: self.n])

    @property
    def num_logprobs(self) -> int:
        """Log-probabilities that the answer may hold, at most."""
        return sum(_num_logprobs(request) for request in self.prepared)

    def check_size(self) -> "Plan":
        """The plan itself. Raises `InvalidRequest` when its answer could take far too much memory."""
        if self.num_logprobs > MAX_LOGPROB_ENTRIES:
            raise InvalidRequest(
                f"logprobs: {len(self.prepared)} choices could have {self.num_logprobs} in all; at most "
                f"{MAX_LOGPROB_ENTRIES}: ask for fewer, or set max_tokens"
            )
        return self


async def plan_completion(engine: Engine, asked: CompletionRequest) -> Plan:
    """Check a completion request. Raises `InvalidRequest` naming the field."""
    arrived_s = time.monotonic()
    prompts = _prompts(asked.prompt)
    check_stream_options(asked)
    n = asked.n or 1
    if len(prompts) * n > MAX_REQUESTS:
        raise InvalidRequest(f"n={n}: {len(prompts)} prompts x n; at most {MAX_REQUESTS} together")
    max_tokens = 16 if asked.max_tokens is None else asked.max_tokens
    if max_tokens == 0 and not asked.echo:
        raise InvalidRequest("max_tokens=0: expected at least 1, or echo=true to see the prompt only")
    params = _params(asked, max(1, max_tokens), asked.logprobs)
    if asked.echo and asked.logprobs is not None:
        params = msgspec.structs.replace(params, prompt_logprobs=asked.logprobs)
    special = asked.add_special_tokens is not False
    prepared = []
    for prompt in prompts:
        one = await _prepare(engine, prompt, params, special, arrived_s)
        _check_length(engine, one, max_tokens if asked.max_tokens is not None else 1)
        prepared += _repeat(one, n)
        if len(prompts) > 1:
            await asyncio.sleep(0)  # many take long: others get their turn
    return Plan(
        prompts=prompts,
        prepared=prepared,
        n=n,
        is_prompt_only=max_tokens == 0,
        with_measured=asked.kvrelay is True,
    ).check_size()


async def plan_chat(engine: Engine, asked: ChatRequest) -> Plan:
    """Check a chat request; without a limit the answer may fill the context. Raises `InvalidRequest`."""
    arrived_s = time.monotonic()
    check_stream_options(asked)
    if asked.echo:
        raise InvalidRequest("echo=true: an answer to a conversation is its message only")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InvalidRequest(f"top_logprobs={asked.top_logprobs}: needs logprobs=true")
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    limit = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    if limit == 0:
        raise InvalidRequest("max_tokens=0: expected at least 1")
    text = render(engine, asked.messages, add_generation_prompt=asked.add_generation_prompt is not False)
    params = _params(asked, engine.max_model_len if limit is None else limit, logprobs)
    with naming_messages():
        one = await _prepare(engine, text, params, asked.add_special_tokens is True, arrived_s)
    _check_length(engine, one, limit or 1)
    n = asked.n or 1
    plan = Plan(prompts=[text], prepared=_repeat(one, n), n=n, with_measured=asked.kvrelay is True)
    return plan.check_size()


def render(engine: Engine, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
    """A conversation as the model's template writes it. Raises `InvalidRequest`."""
    plain = []
    for index, message in enumerate(messages):
        if message.tool_calls:
            raise InvalidRequest(f"messages[{index}].tool_calls: tool calls are not built")
        fields = {"role": message.role, "content": _text(message, index)}
        plain.append(fields if message.name is None else {**fields, "name": message.name})
    try:
        return engine.tokenizer.apply_chat_template(plain, add_generation_prompt)
    except ModelError as error:
        raise InvalidRequest(f"messages: {error}") from None


@contextmanager
def naming_messages() -> Iterator[None]:
    """A prompt that is too long is, to the client, what its messages became."""
    try:
        yield
    except ContextLengthExceeded as error:
        raise ContextLengthExceeded(str(error).replace("prompt", "messages", 1)) from None


async def encode(engine: Engine, text: str, *, add_special_tokens: bool) -> list[int]:
    """Tokens of a text; a long one is tokenised beside the loop. Raises `InvalidRequest` for far too long."""
    longest = engine.max_model_len * engine.tokenizer.longest_token
    if len(text) > longest:
        raise ContextLengthExceeded(
            f"prompt: {len(text)} characters; max_model_len={engine.max_model_len} holds {longest} at most"
        )
    if len(text) < LARGE_TEXT:
        return engine.tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(engine.tokenizer.encode, text, add_special_tokens)


def check_stream_options(asked: Sampling) -> None:
    """`stream_options` mean nothing without a stream."""
    if asked.stream_options is not None and not asked.stream:
        raise InvalidRequest("stream_options: needs stream=true")


def _prompts(given: str | list[str | int | list[int]]) -> list[Prompt]:
    if isinstance(given, str):
        return [given]
    if all(isinstance(item, int) for item in given):
        return [[item for item in given if isinstance(item, int)]]
    prompts = [item for item in given if not isinstance(item, int)]
    if len(prompts) != len(given):
        raise InvalidRequest("prompt: expected text, token ids, or a list of either; got a mixture")
    return prompts


def _params(asked: Sampling, max_tokens: int, logprobs: int | None) -> SamplingParams:
    given = {name: value for name in _SAME_NAME if (value := getattr(asked, name)) is not None}
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)


async def _prepare(
    engine: Engine, prompt: Prompt, params: SamplingParams, special: bool, arrived_s: float
) -> Prepared:
    if isinstance(prompt, str):
        prompt = await encode(engine, prompt, add_special_tokens=special)
    return replace(engine.prepare(prompt, params), arrived_s=arrived_s)  # its tokens took time too


def _check_length(engine: Engine, prepared: Prepared, max_tokens: int) -> None:
    needed = len(prepared.token_ids) + max_tokens
    if needed > engine.max_model_len:
        raise ContextLengthExceeded(
            f"max_tokens={max_tokens}: with {len(prepared.token_ids)} prompt tokens that makes {needed}; "
            f"max_model_len={engine.max_model_len}"
        )


def _num_logprobs(prepared: Prepared) -> int:
    params, num_prompt = prepared.params, len(prepared.token_ids)
    of_prompt = 0 if params.prompt_logprobs is None else params.prompt_logprobs + 1
    of_answer = 0 if params.logprobs is None else params.logprobs + 1
    return num_prompt * of_prompt + (prepared.max_total_tokens - num_prompt) * of_answer


def _repeat(prepared: Prepared, n: int) -> list[Prepared]:
    """The same request `n` times; a seed is counted up, so that the choices differ, and never to -1: none."""
    params = prepared.params
    if n == 1 or params.seed is None:
        return [prepared] * n
    seeds = (params.seed, *((params.seed + index) % 2**63 for index in range(1, n)))
    return [replace(prepared, params=msgspec.structs.replace(params, seed=seed)) for seed in seeds]


def _text(message: ChatMessage, index: int) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise InvalidRequest(
                f"messages[{index}].content: a part of type {part.type!r}; only text is read"
            )
    return "\n".join(part.text or "" for part in message.content)
