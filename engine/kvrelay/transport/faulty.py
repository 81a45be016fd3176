"""A transport that misbehaves on demand, around a real one: what the contracts are tested against.

`transport="faulty:inner=shm,seed=1,drop=0.2,duplicate=0.2,reorder=0.2,delay=0.1,delay_s=0.05,fail=0.01,
hang=0.01,truncate=0.01,bitflip=0.01"`. The numbers are probabilities, each drawn once per write
(`delay`, `fail`, `hang`, `truncate`, `bitflip`) or per notification (`drop`, `duplicate`, `reorder`,
`delay`), except `delay_s`. `limit=N` stops misbehaving after N faults.
"""

import dataclasses
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from kvrelay.cache.memory import KVMemory
from kvrelay.cache.store import KVStore
from kvrelay.errors import InvalidConfig, TransportError
from kvrelay.transport.base import (
    Notice,
    Site,
    Transport,
    TransportEvent,
    Write,
    WriteDone,
    WriteFailed,
)
from kvrelay.transport.copying import num_bytes
from kvrelay.types import TicketId, WorkerId
from kvrelay.wakeup import Wakeup
from kvrelay.wire import Descriptor, Notification

FAULTS = ("drop", "duplicate", "reorder", "delay", "fail", "hang", "truncate", "bitflip")
MAX_NUMBER = {"seed": 2.0**53, "limit": 2.0**53, "delay_s": 60.0}  # of an option that is no probability


@dataclasses.dataclass(slots=True)
class _Held:
    release_s: float
    action: Callable[[], None]
    write: Write | None


@dataclasses.dataclass(slots=True)
class _Tampered:
    posted: Write
    asked: Write
    flip: tuple[int, int] | None  # byte and bit; None: the write was truncated


class FaultyTransport:
    """See `Transport`; `counters["fault_NAME"]` counts what was done."""

    def __init__(self, site: Site, options: dict[str, str]) -> None:
        from kvrelay.transport import open_transport

        inner = options.get("inner", "shm")
        numbers = {key: _number(key, value) for key, value in options.items() if key != "inner"}
        self._random = random.Random(f"{numbers.pop('seed', 0)}/{site.worker_id}")
        self._delay_s = numbers.pop("delay_s", 0.02)
        self._remaining = int(numbers.pop("limit", MAX_NUMBER["limit"]))
        self._chance = numbers
        self._held: list[_Held] = []
        self._outcomes: list[TransportEvent] = []
        self._tampered: list[_Tampered] = []
        self._source: KVMemory | None = None
        self.counters: dict[str, int] = {}
        self._inner: Transport = open_transport(inner, site)
        self._wakeup = Wakeup()

    def allocate(self, num_bytes: int) -> memoryview:
        return self._inner.allocate(num_bytes)

    def register(self, store: KVStore) -> Descriptor:
        self._source = store.memory
        return self._inner.register(store)

    def connect(self, peer: Descriptor) -> None:
        self._inner.connect(peer)
        if "bitflip" in self._chance and not isinstance(self._peer_memory(peer.worker_id), KVMemory):
            raise TransportError(f"bitflip: the pages of {peer.worker_id} are not mapped here")

    def write(self, write: Write) -> None:
        if self._strikes("hang"):
            return
        if self._strikes("fail"):
            self._outcomes.append(WriteFailed(write, "fault injected"))
            self._wakeup.set()
        elif self._strikes("truncate"):
            half = len(write.source_blocks) // 2
            sources, targets = write.source_blocks[:half], write.target_blocks[:half]
            parts = write.parts and write.parts[:half]
            posted = dataclasses.replace(write, source_blocks=sources, target_blocks=targets, parts=parts)
            self._post_tampered(write, posted, None)
        elif self._strikes("bitflip"):
            flip = (self._random.randrange(64), self._random.randrange(8))
            self._post_tampered(write, dataclasses.replace(write), flip)
        elif self._strikes("delay"):
            self._hold(lambda: self._inner.write(write), write)
        else:
            self._inner.write(write)

    def withdraw(self, write: Write) -> bool:
        held = next((each for each in self._held if each.write is write), None)
        if held is not None:
            self._held.remove(held)
            return True
        tampered = next((each for each in self._tampered if each.asked is write), None)
        if not self._inner.withdraw(write if tampered is None else tampered.posted):
            return False
        if tampered is not None:
            self._tampered.remove(tampered)
        return True

    def cancel(self, ticket_id: TicketId) -> None:
        self._held = [held for held in self._held if held.write is None or held.write.ticket_id != ticket_id]
        self._tampered = [each for each in self._tampered if each.asked.ticket_id != ticket_id]
        self._outcomes = [
            event
            for event in self._outcomes
            if not isinstance(event, WriteDone | WriteFailed) or event.write.ticket_id != ticket_id
        ]
        self._inner.cancel(ticket_id)

    def notify(self, peer: WorkerId, message: Notification) -> None:
        if self._strikes("drop"):
            return

        def send() -> None:
            self._inner.notify(peer, message)

        if self._strikes("reorder") or self._strikes("delay"):
            self._hold(send)
        else:
            send()
        if self._strikes("duplicate"):
            self._hold(send)

    def poll(self) -> list[TransportEvent]:
        self._wakeup.clear()
        now_s = time.monotonic()
        due = [held for held in self._held if held.release_s <= now_s]
        self._held = [held for held in self._held if held.release_s > now_s]
        for held in due:
            try:
                held.action()
            except TransportError:
                self._count("late_failure")  # as if it had been lost
        outcomes, self._outcomes = self._outcomes, []
        return outcomes + [self._tamper(event) for event in self._inner.poll()]

    def pollables(self) -> list[Any]:
        return [*self._inner.pollables(), self._wakeup.fileno()]

    def telemetry(self) -> dict[str, int]:
        return self._inner.telemetry() | self.counters

    def close(self) -> None:
        self._held.clear()
        self._inner.close()
        self._wakeup.close()

    def _hold(self, action: Callable[[], None], write: Write | None = None) -> None:
        release_s = time.monotonic() + self._delay_s * self._random.random()
        self._held.append(_Held(release_s, action, write))

    def _strikes(self, fault: str) -> bool:
        if self._remaining <= 0 or self._random.random() >= self._chance.get(fault, 0.0):
            return False
        self._remaining -= 1
        self._count(fault)
        return True

    def _count(self, fault: str) -> None:
        self.counters[f"fault_{fault}"] = self.counters.get(f"fault_{fault}", 0) + 1

    def _post_tampered(self, write: Write, posted: Write, flip: tuple[int, int] | None) -> None:
        self._tampered.append(_Tampered(posted, write, flip))
        self._inner.write(posted)

    def _tamper(self, event: TransportEvent) -> TransportEvent:
        """Report a tampered write as if it had been whole; flip a bit of what it wrote if that is due."""
        if isinstance(event, Notice):
            return event
        found = next((each for each in self._tampered if each.posted is event.write), None)
        if found is None:
            return event
        self._tampered.remove(found)
        if isinstance(event, WriteFailed):
            return dataclasses.replace(event, write=found.asked)
        if found.flip is not None:
            byte, bit = found.flip
            written = _first_bytes(self._peer_memory(found.asked.peer), found.asked)
            written[byte % len(written)] ^= 1 << bit
        assert self._source is not None
        return dataclasses.replace(event, write=found.asked, num_bytes=num_bytes(self._source, found.asked))

    def _peer_memory(self, peer: WorkerId) -> KVMemory:
        inner: Any = self._inner
        memory: KVMemory = inner.writer.peers[peer]
        return memory


def _first_bytes(memory: KVMemory, write: Write) -> torch.Tensor:
    """Bytes that the write put there: K of head 0 of its first block, or that block's first part."""
    block, part = write.target_blocks[0], write.parts[0] if write.parts else 0
    half, head = divmod(part, memory.pages.shape[3])
    if half == 2:
        return memory.vectors[write.layer, 1, block].view(torch.uint8).view(-1)
    return memory.pages[write.layer, half, block, head].view(torch.uint8).view(-1)


def _number(key: str, value: str) -> float:
    if key not in (*FAULTS, *MAX_NUMBER):
        raise InvalidConfig(f"transport=faulty has no option {key!r}; it has {', '.join(FAULTS)}, …")
    largest = MAX_NUMBER.get(key, 1.0)
    try:
        number = float(value)
    except ValueError:
        raise InvalidConfig(f"transport=faulty: {key}={value!r} is not a number") from None
    if not 0.0 <= number <= largest:
        raise InvalidConfig(f"transport=faulty: {key}={value}: expected 0 to {largest:g}")
    return number
