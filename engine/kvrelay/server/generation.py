"""One HTTP request's requests to the engine: their events, gathered on the server's loop, and their end.

Knows events and threads. Knows nothing of documents.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from kvrelay.energy import RequestEnergy
from kvrelay.engine import Engine, Prepared
from kvrelay.metrics import SPANS
from kvrelay.outputs import RequestOutput, StreamEvent
from kvrelay.types import RequestId

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Burst = list[tuple[int, StreamEvent]]
NUM_RECENT = 50
PARTS = tuple(dict.fromkeys(SPANS.values()))


class ClientGone(Exception):
    """Nobody is left to answer."""


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a request: its ledger (seconds), its joules, its counts; nothing of its text."""

    request_id: RequestId
    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    parts_s: dict[str, float]
    ttft_s: float | None
    e2e_s: float
    energy: RequestEnergy

    @classmethod
    def of(cls, output: RequestOutput) -> "Ended":
        """From a finished request."""
        return cls(
            request_id=output.request_id,
            finish_reason=output.finish_reason,
            num_prompt_tokens=len(output.prompt_token_ids),
            num_output_tokens=len(output.token_ids),
            parts_s={part.removesuffix("_s"): getattr(output.timings, part) for part in PARTS},
            ttft_s=output.timings.ttft_s,
            e2e_s=output.timings.e2e_s,
            energy=output.energy,
        )


class EventBridge:
    """Carries events from the router's thread to the loop, with one wake-up for all that come together.

    A response's first event goes ahead: it would else wait until every other stream's next one is written.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self.engine, self._loop = engine, loop
        self.recent: deque[Ended] = deque(maxlen=NUM_RECENT)
        self._events: deque[tuple[Generation, int, StreamEvent]] = deque()
        self._later: deque[tuple[Generation, int, StreamEvent]] = deque()
        self._is_woken = False

    def put(self, generation: "Generation", index: int, event: StreamEvent) -> None:
        """Called on the router's thread, in which nothing may block."""
        self._events.append((generation, index, event))
        if not self._is_woken:  # the loop lowers the flag before it looks, so that nothing is left lying
            self._is_woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._is_woken = False
        while self._events:
            generation, index, event = self._events.popleft()
            if generation.has_begun:
                self._later.append((generation, index, event))
            else:
                generation.receive(index, event)
        self._loop.call_soon(self._hand_out_later)  # when the first ones have been written

    def _hand_out_later(self) -> None:
        while self._later:
            generation, index, event = self._later.popleft()
            generation.receive(index, event)


async def until_gone(receive: Receive) -> None:
    """Return when the client has left, or has had its response. Its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Generation:
    """Requests that are answered together; `close` aborts those still running.

    With `ends_only` events before a request's last are dropped where they arise, and without `with_progress`
    those that tell of a long prompt's.
    """

    def __init__(
        self, bridge: EventBridge, prepared: Sequence[Prepared], *, ends_only: bool, with_progress: bool
    ) -> None:
        self._bridge, self._ends_only, self._with_progress = bridge, ends_only, with_progress
        self._events: Burst = []
        self._arrived = asyncio.Event()
        self.has_begun = self._is_abandoned = False
        self._watch: asyncio.Task[None] | None = None
        self._unfinished: dict[int, RequestId] = {}
        for index, request in enumerate(prepared):
            self._unfinished[index] = bridge.engine.submit(request, partial(self._on_event, index))

    def watch(self, receive: Receive) -> None:
        """Abort as soon as the client is gone; its body must have been read."""
        self._watch = asyncio.create_task(self._wait_for_disconnect(receive))

    async def bursts(self) -> AsyncIterator[Burst]:
        """Events as they come, those of one moment together, until every request has ended.

        Raises what any request failed with, or `ClientGone`.
        """
        while self._unfinished:
            await self._arrived.wait()
            self._arrived.clear()
            if self._is_abandoned:
                raise ClientGone
            burst, self._events = self._events, []
            for index, event in burst:
                if event.error is not None:
                    self._unfinished.pop(index, None)
                    raise event.error
                if event.output is not None:
                    self._unfinished.pop(index, None)
            if burst:
                yield burst

    async def outputs(self) -> list[RequestOutput]:
        """Every request's output, in order. Raises as `bursts` does."""
        found: dict[int, RequestOutput] = {}
        async for burst in self.bursts():
            found |= {index: event.output for index, event in burst if event.output is not None}
        return [found[index] for index in sorted(found)]

    def close(self) -> None:
        """End what is unfinished: its blocks come home. Safe to call twice."""
        if self._watch is not None:
            self._watch.cancel()
        for request_id in self._unfinished.values():
            self._bridge.engine.finish(request_id)
        self._unfinished.clear()

    def receive(self, index: int, event: StreamEvent) -> None:
        """One event, on the loop."""
        self.has_begun |= event.num_prefilled is None
        if event.output is not None:
            self._bridge.recent.append(Ended.of(event.output))
        self._events.append((index, event))
        self._arrived.set()

    def _on_event(self, index: int, event: StreamEvent) -> None:
        is_unwanted = self._ends_only if event.num_prefilled is None else not self._with_progress
        if not is_unwanted or event.output is not None or event.error is not None:
            self._bridge.put(self, index, event)

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        await until_gone(receive)
        self._is_abandoned = True
        self._arrived.set()
