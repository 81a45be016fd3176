"""The real router over simulated workers under a virtual clock: policies and limits tried in milliseconds.

Nothing here is a measurement of hardware; what is real is the router, message by message.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from kvrelay.config import EngineConfig
from kvrelay.errors import KVRelayError, Overloaded
from kvrelay.experiments.simulated_worker import CHUNK_TOKENS, SimulatedWorker, WorkerModel, hello_of
from kvrelay.metrics import Ledger, Timings
from kvrelay.router.control import Control
from kvrelay.router.request import RoutedRequest, Update
from kvrelay.sampling_params import SamplingParams
from kvrelay.types import RequestId, TransferTicket, WorkerId
from kvrelay.wire import Connect, Connected, Message, StepReport

TICK_S = 0.05
HOP_S = 0.0005  # a message's way, either direction


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(slots=True)
class Outcome:
    """What became of one request; `timings` is None when it was refused at the door."""

    arrival: Arrival
    timings: Timings | None = None
    error: KVRelayError | None = None

    @property
    def mean_itl_s(self) -> float:
        """Mean gap between tokens, 0 for a single token."""
        gaps = self.timings.itl_s if self.timings is not None else []
        return sum(gaps) / len(gaps) if gaps else 0.0


class Simulation:
    """Runs a trace through one router with these engine settings.

    `outcomes` are in the trace's order. `joules` of all workers together: idle power times the time to the
    last event, plus (busy - idle) power times busy time.
    """

    def __init__(self, models: Sequence[WorkerModel], **settings: Any) -> None:
        self.now_s = 0.0
        self.outcomes: list[Outcome] = []
        self._ledgers: dict[RequestId, Ledger] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        config = EngineConfig.of(model="simulated", **settings)
        self.control = Control(config, self._to_worker, self._no_call, self._on_update)
        self.router, self.router.observer = self.control.router, self.control.telemetry
        self.workers = {WorkerId(model.worker_id): SimulatedWorker(model, self) for model in models}
        for model in models:
            self.router.fleet.add(hello_of(model), model.max_num_seqs, CHUNK_TOKENS)

    def run(self, trace: Sequence[Arrival]) -> "Simulation":
        """Until the last request has ended."""
        for index, arrival in enumerate(trace):
            self.outcomes.append(Outcome(arrival))
            self.later(arrival.at_s, lambda i=index: self._submit(i))  # type: ignore[misc]
        last_s = max((arrival.at_s for arrival in trace), default=0.0)
        self.later(TICK_S, lambda: self._tick(last_s))
        while self._events:
            self.now_s, _, function = heapq.heappop(self._events)
            function()
        return self

    def later(self, delay_s: float, function: Callable[[], None]) -> None:
        """Call `function` in `delay_s` of virtual time."""
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._numbers), function))

    def say(self, message: Message) -> None:
        """A worker's message to the router."""
        self.later(HOP_S, lambda: self._to_router(message))

    def fill(self, ticket: TransferTicket) -> None:
        """The ticket's KV is on its way to its decode worker."""
        self.later(HOP_S, lambda: self.workers[ticket.decode_worker].commit(ticket.ticket_id))

    @property
    def joules(self) -> float:
        """See the class."""
        each = self.workers.values()
        idle_j = sum(worker.model.idle_w * self.now_s for worker in each)
        return idle_j + sum((w.model.busy_w - w.model.idle_w) * w.busy_s for w in each)

    @property
    def num_output_tokens(self) -> int:
        """Tokens delivered."""
        return self.router.counts.num_output_tokens

    def _no_call(self, function: Callable[[float], Any]) -> "Future[Any]":
        raise AssertionError("there is one thread here")

    def _to_worker(self, worker_id: WorkerId, message: Message) -> None:
        if isinstance(message, Connect):
            answer = Connected(worker_id=worker_id, peer=message.peer.worker_id)
            self.later(2 * HOP_S, lambda: self._connected(answer))
            return
        self.later(HOP_S, lambda: self.workers[worker_id].on(message))

    def _connected(self, answer: Connected) -> None:
        self.control.on_connected(answer, self.now_s)

    def _to_router(self, message: Message) -> None:
        self.router.on_message(message, self.now_s)
        if isinstance(message, StepReport):  # the meter has seen the worker at work
            model = self.workers[message.worker_id].model
            self.router.fleet.loads[message.worker_id].watts[message.phase] = model.busy_w - model.idle_w

    def _tick(self, last_s: float) -> None:
        self.control.tick(self.now_s)
        if self.router.requests or self.now_s < last_s:
            self.later(TICK_S, lambda: self._tick(last_s))

    def _submit(self, index: int) -> None:
        arrival = self.outcomes[index].arrival
        request = RoutedRequest(
            request_id=RequestId(f"r{index}"),
            arrival=index,
            params=SamplingParams(max_tokens=arrival.num_output_tokens),
            seed=index,
            token_ids=[0] * arrival.num_prompt_tokens,
            num_prompt_tokens=arrival.num_prompt_tokens,
            max_total_tokens=arrival.num_prompt_tokens + arrival.num_output_tokens,
        )
        self._ledgers[request.request_id] = request.ledger
        try:
            self.router.submit(request, self.now_s)
        except Overloaded as error:
            self.outcomes[index].error = error

    def _on_update(self, update: Update) -> None:
        if update.finish_reason is None and update.error is None:
            return
        outcome = self.outcomes[int(update.request_id[1:])]
        outcome.error = update.error
        outcome.timings = self._ledgers[update.request_id].timings(update.at_s)
