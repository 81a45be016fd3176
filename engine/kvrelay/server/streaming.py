"""Server-sent events: a generation's bursts written as they come, each burst in one send.

Source of the format: https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing

import msgspec
from fastapi import Response
from msgspec import UNSET
from starlette.types import Receive, Scope, Send

from kvrelay.errors import KVRelayError
from kvrelay.outputs import StreamEvent
from kvrelay.server.errors import error_body
from kvrelay.server.generation import Burst, ClientGone
from kvrelay.server.plan import Plan
from kvrelay.server.requests import StreamOptions
from kvrelay.server.writers import MaybeUsage, Writer, total_usage

MANY_LOGPROBS = 1000
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that collects a stream defeats it
]


class EventStream(Response):
    """Sends what `events` yields; `close` is called however the response ends."""

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream")
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            async with aclosing(self._events) as pieces:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            return
        finally:
            self._close()


class Chunks:
    """The chunks of one streamed response, counting tokens as they pass."""

    def __init__(self, plan: Plan, writer: Writer, options: StreamOptions | None) -> None:
        self._plan, self._writer = plan, writer
        self._at_end = options is not None and options.include_usage is True
        self._always = options is not None and options.continuous_usage_stats is True
        self._num_tokens = self._num_cached = 0

    async def pieces(self, first: Burst, rest: AsyncIterator[Burst]) -> AsyncGenerator[bytes, None]:
        """`first`, which has come already, then the rest; an error on the way is the last event but one."""
        try:
            yield await self._encode(first)
            async for burst in rest:
                yield await self._encode(burst)
            if self._at_end:
                usage = total_usage(self._plan, self._num_tokens, self._num_cached)
                yield _event(self._writer.usage_chunk(usage))
        except KVRelayError as error:
            yield _event(error_body(error)[1])
        yield DONE

    async def _encode(self, burst: Burst) -> bytes:
        def encoded() -> bytes:
            progress = [self._progress(*told) for told in burst if told[1].num_prefilled is not None]
            chunks = [
                _event(chunk)
                for index, event in _merged([told for told in burst if told[1].num_prefilled is None])
                for chunk in self._writer.chunks(index, event, self._usage(index, event))
            ]
            return b"".join([*progress, *chunks])

        return await beside_loop(sum(len(event.prompt_logprobs or ()) for _, event in burst), encoded)

    def _progress(self, index: int, event: StreamEvent) -> bytes:
        """A comment: clients of the format pass over it."""
        num_tokens = len(self._plan.prepared[index].token_ids)
        return f": choice {index}: {event.num_prefilled} of {num_tokens} prompt tokens computed\n\n".encode()

    def _usage(self, index: int, event: StreamEvent) -> MaybeUsage:
        self._num_tokens += len(event.token_ids)
        if event.output is not None and index % self._plan.n == 0:  # a prompt counts once
            self._num_cached += event.output.num_cached_tokens
        if self._always:
            return total_usage(self._plan, self._num_tokens, None)
        return None if self._at_end else UNSET


async def beside_loop(num_logprobs: int, encoded: Callable[[], bytes]) -> bytes:
    """What `encoded` returns; made on a thread where that takes long, so that others are served meanwhile."""
    return await asyncio.to_thread(encoded) if num_logprobs > MANY_LOGPROBS else encoded()


def _merged(burst: Burst) -> Iterable[tuple[int, StreamEvent]]:
    """One event for each choice of the burst: texts and tokens joined."""
    found: dict[int, StreamEvent] = {}
    for index, event in burst:
        before = found.get(index)
        found[index] = event if before is None else _joined(before, event)
    return found.items()


def _joined(first: StreamEvent, second: StreamEvent) -> StreamEvent:
    return StreamEvent(
        request_id=first.request_id,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs,
        output=second.output,
    )


def _event(document: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"
