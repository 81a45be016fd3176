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

from kvrelay.cache.store import KVStore
from kvrelay.errors import InvalidConfig
from kvrelay.transport.base import (
    Notification,
    Site,
    Transport,
    TransportEvent,
    Write,
    WriteDone,
    WriteFailed,
)
from kvrelay.types import TicketId, WorkerId
from kvrelay.wire import Descriptor

FAULTS = ("drop", "duplicate", "reorder", "delay", "fail", "hang", "truncate", "bitflip")


@dataclasses.dataclass(slots=True)
class _Held:
    release_s: float
    ticket_id: TicketId
    action: Callable[[], None]
    is_write: bool


class FaultyTransport:
    """See `Transport`; `counters["fault_NAME"]` counts what was done."""

    def __init__(self, site: Site, options: dict[str, str]) -> None:
        from kvrelay.transport import open_transport

        options = dict(options)
        self._inner: Transport = open_transport(options.pop("inner", "shm"), site)
        numbers = {key: _number(key, value) for key, value in options.items()}
        self._random = random.Random(f"{numbers.pop('seed', 0)}/{site.worker_id}")
        self._delay_s = numbers.pop("delay_s", 0.02)
        self._remaining = int(numbers.pop("limit", 1 << 62))
        self._chance = numbers
        self._held: list[_Held] = []
        self._outcomes: list[TransportEvent] = []
        self._tampered: dict[int, tuple[Write, str]] = {}
        self.counters: dict[str, int] = {}

    def allocate(self, num_bytes: int) -> memoryview:
        return self._inner.allocate(num_bytes)

    def register(self, store: KVStore) -> Descriptor:
        return self._inner.register(store)

    def connect(self, peer: Descriptor) -> None:
        self._inner.connect(peer)

    def write(self, write: Write) -> None:
        if self._strikes("hang"):
            return
        if self._strikes("fail"):
            self._outcomes.append(WriteFailed(write, "fault injected"))
        elif self._strikes("truncate"):
            half = len(write.source_blocks) // 2
            short = dataclasses.replace(
                write, source_blocks=write.source_blocks[:half], target_blocks=write.target_blocks[:half]
            )
            self._tampered[id(short)] = (write, "truncate")
            self._inner.write(short)
        elif self._strikes("bitflip"):
            copy = dataclasses.replace(write)
            self._tampered[id(copy)] = (write, "bitflip")
            self._inner.write(copy)
        elif self._strikes("delay"):
            self._hold(write.ticket_id, lambda: self._inner.write(write), is_write=True)
        else:
            self._inner.write(write)

    def cancel(self, ticket_id: TicketId) -> None:
        self._held = [held for held in self._held if held.ticket_id != ticket_id or not held.is_write]
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
            self._hold(message.ticket_id, send, is_write=False)
        else:
            send()
        if self._strikes("duplicate"):
            self._hold(message.ticket_id, send, is_write=False)

    def poll(self) -> list[TransportEvent]:
        now_s = time.monotonic()
        due = [held for held in self._held if held.release_s <= now_s]
        self._held = [held for held in self._held if held.release_s > now_s]
        for held in due:
            held.action()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes + [self._tamper(event) for event in self._inner.poll()]

    def pollables(self) -> list[Any]:
        return self._inner.pollables()

    def telemetry(self) -> dict[str, int]:
        return self._inner.telemetry() | self.counters

    def close(self) -> None:
        self._held.clear()
        self._inner.close()

    def _hold(self, ticket_id: TicketId, action: Callable[[], None], *, is_write: bool) -> None:
        release_s = time.monotonic() + self._delay_s * self._random.random()
        self._held.append(_Held(release_s, ticket_id, action, is_write))

    def _strikes(self, fault: str) -> bool:
        if self._remaining <= 0 or self._random.random() >= self._chance.get(fault, 0.0):
            return False
        self._remaining -= 1
        self.counters[f"fault_{fault}"] = self.counters.get(f"fault_{fault}", 0) + 1
        return True

    def _tamper(self, event: TransportEvent) -> TransportEvent:
        """Report a tampered write as if it had been whole; flip a bit of what it wrote if that is due."""
        if not isinstance(event, WriteDone) or id(event.write) not in self._tampered:
            return event
        write, fault = self._tampered.pop(id(event.write))
        num_bytes = event.num_bytes
        if fault == "bitflip":
            page = self._peer_pages(write.peer)[write.layer, 0, write.target_blocks[0]]
            page.view(torch.uint8).view(-1)[self._random.randrange(64)] ^= 1 << self._random.randrange(8)
        else:
            num_bytes = len(write.source_blocks) * self._peer_pages(write.peer)[write.layer, :, 0].nbytes
        return dataclasses.replace(event, write=write, num_bytes=num_bytes)

    def _peer_pages(self, peer: WorkerId) -> torch.Tensor:
        inner: Any = self._inner
        pages: torch.Tensor = inner.writer.peers[peer]
        return pages


def _number(key: str, value: str) -> float:
    if key not in (*FAULTS, "seed", "delay_s", "limit"):
        raise InvalidConfig(f"transport=faulty has no option {key!r}; it has {', '.join(FAULTS)}, …")
    try:
        return float(value)
    except ValueError:
        raise InvalidConfig(f"transport=faulty: {key}={value!r} is not a number") from None
