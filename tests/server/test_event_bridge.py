"""How events reach the server's loop: first ones ahead, each response's own in order."""

import asyncio
from dataclasses import dataclass
from typing import Any, cast

from kvrelay.engine import Engine
from kvrelay.outputs import StreamEvent
from kvrelay.server.generation import EventBridge, Generation
from kvrelay.types import RequestId


@dataclass
class Listener:
    """A response that notes what reaches it in a list that all share."""

    name: str
    heard: list[str]
    has_begun: bool = False

    def receive(self, index: int, event: StreamEvent) -> None:
        self.has_begun = True
        self.heard.append(f"{self.name}{event.text}")


def hear(*rounds: list[tuple[str, str]]) -> list[str]:
    """What the listeners hear of events put at once in each round; `old` has begun, the others have not."""
    heard: list[str] = []
    listeners = {name: Listener(name, heard, name == "old") for name in ("old", "new", "other")}

    async def run() -> None:
        bridge = EventBridge(cast(Engine, None), asyncio.get_running_loop())
        for events in rounds:
            for name, text in events:
                event = StreamEvent(request_id=RequestId(name), text=text)
                bridge.put(cast(Generation, cast(Any, listeners[name])), 0, event)
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(run())
    return heard


def test_a_first_event_is_handed_out_before_the_next_ones_of_others() -> None:
    assert hear([("old", "1"), ("new", "1"), ("old", "2"), ("other", "1")]) == [
        "new1",
        "other1",
        "old1",
        "old2",
    ]


def test_the_others_wait_until_a_first_event_can_have_been_written() -> None:
    heard: list[str] = []

    async def run() -> None:
        bridge = EventBridge(cast(Engine, None), asyncio.get_running_loop())
        for listener in (Listener("old", heard, has_begun=True), Listener("new", heard)):
            bridge.put(cast(Any, listener), 0, StreamEvent(request_id=RequestId(listener.name)))
        await asyncio.sleep(0)
        assert heard == ["new"]
        await asyncio.sleep(0)

    asyncio.run(run())
    assert heard == ["new", "old"]


def test_a_response_has_begun_once_it_heard_more_than_progress() -> None:
    generation = Generation(cast(EventBridge, None), [], ends_only=False, with_progress=True)
    assert not generation.has_begun
    generation.receive(0, StreamEvent(request_id=RequestId("r"), num_prefilled=64))
    assert not generation.has_begun, "what is most waited for is still to come"
    generation.receive(0, StreamEvent(request_id=RequestId("r")))
    assert generation.has_begun


def test_what_a_response_hears_is_in_order_even_when_more_comes_meanwhile() -> None:
    heard = hear([("old", "1"), ("new", "1"), ("new", "2")], [("new", "3"), ("old", "2")])
    assert [text for text in heard if text.startswith("new")] == ["new1", "new2", "new3"]
    assert [text for text in heard if text.startswith("old")] == ["old1", "old2"]
