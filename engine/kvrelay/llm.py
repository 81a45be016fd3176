"""The Python API: `LLM` for batches and scripts, `AsyncLLM` for servers and experiments with concurrency."""

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

from kvrelay.config import EngineConfig
from kvrelay.engine import Engine, Prompt
from kvrelay.errors import InvalidRequest, KVRelayError
from kvrelay.metrics import Report
from kvrelay.outputs import RequestOutput, StreamEvent
from kvrelay.sampling_params import SamplingParams
from kvrelay.types import RequestId

Message = dict[str, str]


class RequestsFailed(KVRelayError):
    """Some requests of a batch failed. `outputs` has the others' results in order, None where one failed."""

    def __init__(self, errors: Sequence[KVRelayError], outputs: list[RequestOutput | None]) -> None:
        super().__init__(f"{len(errors)} of {len(outputs)} requests failed; the first: {errors[0]}")
        self.errors, self.outputs = list(errors), outputs


class LLM:
    """A model served by worker processes, for the length of a `with` block or until `close`.

    `settings` are the fields of `EngineConfig`: mode, prefill_workers, decode_workers, transport, device,
    dtype, attention, max_model_len, num_kv_blocks, power_model, …. Raises `InvalidConfig`, `UnknownName`,
    `ModelError` or `WorkerFailed`, each naming what was wrong.
    """

    def __init__(self, /, model: str, **settings: Any) -> None:
        self.engine = Engine(EngineConfig.of(model=model, **settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Run prompts (text or token ids) together; outputs in the prompts' order.

        Nothing is started unless every prompt is valid (`InvalidRequest` names the one that is not).
        Raises `RequestsFailed`, which carries the other outputs, when some fail on the way.
        """
        batch = _batch(prompts)
        outputs: list[RequestOutput | None] = [None] * len(batch)
        errors: dict[int, KVRelayError] = {}
        for index, event in self.stream_many(batch, params):
            if event.output is not None:
                outputs[index] = event.output
            if event.error is not None:
                errors[index] = event.error
        if errors:
            raise RequestsFailed([errors[index] for index in sorted(errors)], outputs)
        return [output for output in outputs if output is not None]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's own chat template."""
        return self.generate(self.render(messages), params)

    def render(self, messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Prompt]:
        """Conversations as token ids, ready for `generate`. Raises `InvalidRequest` for a malformed one."""
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        return [render_chat(self.engine, conversation) for conversation in conversations]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """One prompt, piece by piece. Raises what the request failed with; leaving early aborts it."""
        for _, event in self.stream_many([prompt], params):
            if event.error is not None:
                raise event.error
            yield event

    def stream_many(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, StreamEvent]]:
        """Several prompts together: (index of the prompt, its news) until all have ended.

        A failed request's last event carries `error`. Leaving early aborts what is unfinished.
        """
        if isinstance(prompts, str):
            raise InvalidRequest("prompts: expected a list of prompts; got str")
        each = _each(params, len(prompts))
        prepared = []
        for index, (prompt, chosen) in enumerate(zip(prompts, each, strict=True)):
            try:
                prepared.append(self.engine.prepare(prompt, chosen))
            except InvalidRequest as error:
                raise type(error)(f"prompt {index}: {error}") from None
        events: queue.SimpleQueue[tuple[int, StreamEvent]] = queue.SimpleQueue()
        unfinished: dict[int, RequestId] = {}
        try:
            for index, request in enumerate(prepared):
                unfinished[index] = self.engine.submit(request, partial(_put, events, index))
            while unfinished:
                index, event = events.get()
                if event.output is not None or event.error is not None:
                    del unfinished[index]
                yield index, event
        finally:
            for request_id in unfinished.values():
                self.engine.finish(request_id)

    def report(self) -> Report:
        """Tokens/s and tokens/joule per phase and per worker, so far."""
        return self.engine.report()

    def close(self) -> None:
        """Stop the workers; nothing is left behind. Safe to call twice."""
        self.engine.close()


class AsyncLLM:
    """The same engine for asyncio: `async with AsyncLLM(...) as llm`, or `close` at the end."""

    def __init__(self, /, model: str, **settings: Any) -> None:
        self.engine = Engine(EngineConfig.of(model=model, **settings))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[StreamEvent]:
        """One prompt, piece by piece. Raises what the request failed with; leaving early aborts it."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[StreamEvent] = asyncio.Queue()

        def on_event(event: StreamEvent) -> None:
            with suppress(RuntimeError):  # the caller's loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        chosen = SamplingParams() if params is None else params
        request_id = self.engine.submit(self.engine.prepare(prompt, chosen), on_event)
        is_over = False
        try:
            while not is_over:
                event = await events.get()
                is_over = event.output is not None or event.error is not None
                if event.error is not None:
                    raise event.error
                yield event
        finally:
            if not is_over:
                self.engine.finish(request_id)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """One prompt's finished output. Raises what the request failed with."""
        output = None
        async for event in self.stream(prompt, params):
            output = event.output
        assert output is not None, "a stream ends with an output or an error"
        return output

    async def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> RequestOutput:
        """Answer one conversation through the model's own chat template."""
        return await self.generate(render_chat(self.engine, messages), params)

    def report(self) -> Report:
        """Tokens/s and tokens/joule per phase and per worker, so far."""
        return self.engine.report()

    async def close(self) -> None:
        """Stop the workers; nothing is left behind. Safe to call twice."""
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close)


def _put(events: "queue.SimpleQueue[tuple[int, StreamEvent]]", index: int, event: StreamEvent) -> None:
    events.put((index, event))


def render_chat(engine: Engine, messages: Any) -> list[int]:
    """A conversation through the model's chat template, as token ids. Raises `InvalidRequest` for no list."""
    if isinstance(messages, str) or not all(isinstance(message, dict) for message in messages):
        raise InvalidRequest("messages: expected a list of {'role': ..., 'content': ...}")
    text = engine.tokenizer.apply_chat_template(messages)
    return engine.tokenizer.encode(text, add_special_tokens=False)


def _batch(prompts: Any) -> list[Prompt]:
    if not isinstance(prompts, str | list | tuple):
        raise InvalidRequest(
            f"prompts: expected text, token ids, or a list of them; got {type(prompts).__name__}"
        )
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def _each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple):
        raise InvalidRequest(
            f"params: expected SamplingParams or a list of them; got {type(params).__name__}"
        )
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} sampling params for {count} prompts")
    return list(params)
