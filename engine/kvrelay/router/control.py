"""One engine's router and all that goes with it: books, metrics, links, role changes.

Everything but `open_books`, `probe` and `set_role` is used on the router's thread only. Knows no sockets.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from kvrelay.config import EngineConfig
from kvrelay.errors import KVRelayError
from kvrelay.router.core import Router
from kvrelay.router.counts import RunCounts
from kvrelay.router.links import Links
from kvrelay.router.measure import Measurement
from kvrelay.router.planner import PoolPlanner
from kvrelay.router.policies import open_policy
from kvrelay.router.probes import Probes
from kvrelay.router.request import RoutedRequest, Update
from kvrelay.router.roles import RoleChanges
from kvrelay.router.settings import RouterSettings
from kvrelay.router.spans import open_spans
from kvrelay.router.telemetry import Telemetry
from kvrelay.types import Role, WorkerId
from kvrelay.wire import Connected, Message


class Call(Protocol):
    """Runs a function of the time on the router's thread."""

    def __call__(self, function: Callable[[float], Any]) -> "Future[Any]": ...


class Control:
    """Owns the parts and wires them to each other; `send` reaches workers, `on_update` requests' owners."""

    def __init__(
        self,
        config: EngineConfig,
        send: Callable[[WorkerId, Message], None],
        call: Call,
        on_update: Callable[[Update], None],
    ) -> None:
        self._call, self._on_update = call, on_update
        self.router = Router(open_policy(config.policy), send, self._deliver, _settings(config))
        self.measurement = Measurement(config, self.router)
        self.telemetry = Telemetry(config, self.router)
        self.probes = Probes(self.router)
        self.links = Links(send, lambda worker_id: self.router.workers[worker_id].hello.descriptor)
        self.roles = RoleChanges(self.router, self.probes, self.links)
        self._planner = PoolPlanner(self.router, self.roles, self.telemetry) if config.role_planner else None
        name = config.served_name()
        self._spans = None if config.otel_endpoint is None else open_spans(config.otel_endpoint, name)
        self._num_probes = 0

    def open_books(self) -> None:
        """Start to measure, from nothing: what the start itself took is not counted.

        Raises what `open_meter` raises, and `InvalidConfig` when the policy needs joules and there are none.
        """
        self._call(self._open_books).result()

    def probe(self, pair: tuple[WorkerId, WorkerId]) -> float:
        """Seconds to first token of one request of our own on that pair. Raises what it failed with."""
        ttft: Future[float] = Future()
        self._num_probes += 1
        name = f"start-{self._num_probes}"
        self._call(lambda now_s: self.probes.send(name, pair, now_s, partial(_set_ttft, ttft))).result()
        return ttft.result()

    def set_role(self, worker_id: WorkerId, role: Role) -> "Future[int]":
        """See `Engine.set_role`."""
        done: Future[int] = Future()

        def on_done(error: KVRelayError | None) -> None:
            self.telemetry.on_role_change("done" if error is None else "rolled_back")
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(self.router.fleet.loads[worker_id].role_epoch)

        begun = self._call(lambda now_s: self.roles.begin(worker_id, role, now_s, on_done))
        begun.add_done_callback(lambda f: done.set_exception(f.exception()) if f.exception() else None)
        return done

    def tick(self, now_s: float) -> None:
        """What time alone brings about: deadlines, role changes, plans."""
        self.router.tick(now_s)
        self.roles.step(now_s)
        self.measurement.update_watts(now_s)
        if self._planner is not None:
            self._planner.step(now_s)

    def on_connected(self, message: Connected, now_s: float) -> KVRelayError | None:
        """A pair shook hands, or failed to, with the error."""
        link, seconds, error = self.links.on_connected(message, now_s)
        self.telemetry.on_handshake(seconds)
        self.roles.on_connected(link, error, now_s)
        return error

    def metrics(self, now_s: float) -> bytes:
        """The text of `/metrics`."""
        return self.telemetry.render(self.measurement.energy(), now_s)

    def close(self) -> None:
        """Stop the energy reader, and send the spans that are left."""
        self.measurement.close()
        if self._spans is not None:
            self._spans.close()

    def _open_books(self, now_s: float) -> None:
        self.router.counts, self.router.queue.num_dispatched = RunCounts(), 0
        self.router.fleet.forget()
        self.router.observer = self.telemetry
        self.telemetry.on_span = None if self._spans is None else self._spans.on_end
        self.measurement.open([worker.hello for worker in self.router.workers.values()])

    def _deliver(self, update: Update) -> None:
        if not self.probes.on_update(update):
            self._on_update(update)


def _settings(config: EngineConfig) -> RouterSettings:
    return RouterSettings(
        max_queued_requests=config.max_queued_requests,
        queue_timeout_s=config.queue_timeout_s,
        slo_ttft_s=config.slo_ttft_s,
        slo_itl_s=config.slo_itl_s,
        local_prefill_tokens=0 if config.local_prefill_tokens == "auto" else config.local_prefill_tokens,
        attention=config.attention,
    )


def _set_ttft(ttft: "Future[float]", request: RoutedRequest, update: Update) -> None:
    if update.error is not None:
        ttft.set_exception(update.error)
    else:
        ttft.set_result(request.ledger.timings(update.at_s).ttft_s or 0.0)
