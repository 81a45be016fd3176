"""The router's thread: owns the control socket, drives the pure core, watches workers.

Everything the core touches is touched on this thread only; other threads hand over closures with `call`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import zmq

from kvrelay import codec, wire
from kvrelay.config import EngineConfig
from kvrelay.errors import ERRORS, EngineClosed, KVRelayError, ProtocolError, WorkerFailed
from kvrelay.router.control import Control
from kvrelay.router.request import Update
from kvrelay.types import WorkerId
from kvrelay.wakeup import Wakeup
from kvrelay.wire import Connected, Hello, Message, Shutdown, StartFailed, StepReport, Stopped

TICK_S = 0.05
ASLEEP_S = 1.0  # a step that comes so late means that the process did not run
LAST_WORDS_S = 0.2  # how long a dead worker's last messages may still be on their way
STOP_TIMEOUT_S = 10.0
MAX_MESSAGES_PER_STEP = 1000

Result = TypeVar("Result")
logger = logging.getLogger("kvrelay")


class WorkerWatch(Protocol):
    """The part of `kvrelay.launch.Workers` that the router needs."""

    def dead(self) -> list[tuple[WorkerId, str]]:
        """Workers that ended since the last call, with reasons."""

    def kill(self, worker_id: WorkerId) -> None:
        """End one at once."""


class Runtime:
    """One router and its thread. `on_update` is called on that thread and must not block or raise."""

    def __init__(
        self,
        config: EngineConfig,
        watch: WorkerWatch,
        endpoint: str,
        on_update: Callable[[Update], None],
    ) -> None:
        self._config, self._watch = config, watch
        self.control = Control(config, self._send, self.call, on_update)
        self.router = self.control.router
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, codec.MAX_MESSAGE_BYTES)
        self._socket.bind(endpoint)
        self._wakeup = Wakeup()
        self._commands: deque[Callable[[], None]] = deque()
        self._waiting_for = {worker_id for worker_id, _ in config.roles()}
        self._ready: Future[None] = Future()
        self._heard_s: dict[WorkerId, float] = {}
        self._looked_s = time.monotonic()
        self._stopped: dict[WorkerId, int] = {}
        self._closing = False
        self._failure: KVRelayError | None = None
        self._lock = threading.Lock()  # between `call` and the last look at what it left
        self._thread = threading.Thread(target=self._run, name="kvrelay-router", daemon=True)
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every worker is loaded and every pair has shaken hands.

        Raises what a worker raised while it started, or `WorkerFailed` with the end of its log.
        """
        try:
            self._ready.result(timeout_s)
        except TimeoutError:
            missing = ", ".join(sorted(self._waiting_for)) or "the handshakes"
            raise WorkerFailed(f"not ready after {timeout_s:g} s; still waiting for {missing}") from None

    def call(self, function: Callable[[float], Result]) -> "Future[Result]":
        """Run `function(now_s)` on the router's thread; the future holds what it returns or raises.

        After `close` it holds `EngineClosed`.
        """
        future: Future[Result] = Future()

        def command() -> None:
            try:
                future.set_result(function(time.monotonic()))
            except Exception as error:  # noqa: BLE001  it is the caller's, whatever it is
                future.set_exception(error)

        with self._lock:
            if self._closing or self._failure is not None:
                future.set_exception(self._failure or EngineClosed("the engine is closed"))
                return future
            self._commands.append(command)
        self._wakeup.set()
        return future

    def fail_all(self, error: KVRelayError) -> None:
        """End every request, and a change of role under way, with `error`."""

        def fail(now_s: float) -> None:
            self.control.roles.close(error)
            self._fail_all(error)

        self.call(fail)

    def close(self) -> dict[WorkerId, int]:
        """Fail what is in flight, stop the workers and the thread; leaked blocks by worker that said so."""
        with self._lock:
            was_closing, self._closing = self._closing, True
        if not was_closing:
            self._wakeup.set()
            self._thread.join()
            self.control.close()
            self._socket.close()
            self._context.term()
            self._wakeup.close()
        return self._stopped

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        try:
            while not self._closing:
                poller.poll(int(TICK_S * 1000))
                self._step()
            self._shut_down()
        except Exception as error:
            logger.exception("the router's thread failed")
            with self._lock:
                self._failure = KVRelayError(f"the router failed: {type(error).__name__}: {error}")
            self._not_ready(self._failure)
            while self._commands:
                self._commands.popleft()()
            self._fail_all(self._failure)

    def _step(self) -> None:
        self._wakeup.clear()
        while self._commands:
            self._commands.popleft()()
        self._receive()
        for worker_id, reason in self._watch.dead():
            self._on_dead(worker_id, reason)
        now_s = time.monotonic()
        self._check_silence(now_s)
        self.control.tick(now_s)

    def _receive(self, timeout_s: float = 0.0) -> None:
        """Handle what has arrived; with a time-out, also what still arrives until then."""
        deadline_s = time.monotonic() + timeout_s
        for _ in range(MAX_MESSAGES_PER_STEP):  # commands and deaths get their turn even under a flood
            if not self._socket.poll(max(0, int((deadline_s - time.monotonic()) * 1000))):
                return
            identity, data = self._socket.recv_multipart()
            try:
                message = codec.decode(data, "worker_to_router")
            except ProtocolError as error:
                logger.error("from %s: %s", identity.decode(errors="replace"), error)
                continue
            now_s = time.monotonic()
            self._heard_s[WorkerId(identity.decode())] = now_s
            self._handle(message, now_s)

    def _handle(self, message: Any, now_s: float) -> None:
        match message:
            case Hello():
                self._on_hello(message)
            case Connected():
                self._on_connected(message)
            case StartFailed():
                error = ERRORS.get(message.error, WorkerFailed)
                self._not_ready(error(f"{message.worker_id} did not start: {message.message}"))
            case Stopped():
                self._stopped[message.worker_id] = message.num_leaked_blocks
            case _:
                if isinstance(message, StepReport):
                    self.control.measurement.on_step(message)
                elif isinstance(message, wire.Heartbeat):
                    self.control.measurement.on_heartbeat(message)
                self.router.on_message(message, now_s)

    def _on_hello(self, hello: Hello) -> None:
        own = self._config.of_worker(hello.worker_id)
        self.router.fleet.add(hello, own.max_num_seqs, own.prefill_chunk_tokens)
        self._waiting_for.discard(hello.worker_id)
        if self._waiting_for:
            return
        hellos = [worker.hello for worker in self.router.workers.values()]
        decodes = [hello for hello in hellos if hello.role == "decode"]
        for prefill in (hello for hello in hellos if hello.role == "prefill"):
            for decode in decodes:
                self.control.links.connect((prefill.worker_id, decode.worker_id), time.monotonic())
        self._say_ready_if_done()

    def _on_connected(self, message: Connected) -> None:
        error = self.control.on_connected(message, time.monotonic())
        if error is not None:
            self._not_ready(error)
        self._say_ready_if_done()

    def _say_ready_if_done(self) -> None:
        if not self.control.links.num_open and not self._waiting_for and not self._ready.done():
            self._ready.set_result(None)

    def _not_ready(self, error: KVRelayError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)

    def _on_dead(self, worker_id: WorkerId, reason: str) -> None:
        self._receive(LAST_WORDS_S)
        self._not_ready(WorkerFailed(f"{worker_id} did not start: {reason}"))
        if worker_id in self.router.workers and not self._closing:
            logger.error("%s died: %s", worker_id, reason)
            self.control.measurement.on_worker_dead(worker_id)
            self.router.on_worker_dead(worker_id, reason, time.monotonic())

    def _check_silence(self, now_s: float) -> None:
        slept_s, self._looked_s = now_s - self._looked_s, now_s
        if slept_s > ASLEEP_S:  # this process was stopped, as workers may have been: silence counts from now
            self._heard_s = dict.fromkeys(self._heard_s, now_s)
        for worker_id, totals in self.router.workers.items():
            silent_s = now_s - self._heard_s.get(worker_id, now_s)
            if (
                totals.is_alive
                and silent_s > self._config.worker_timeout_s
                and self.router.has_work(worker_id)
            ):
                logger.error("%s was silent for %.0f s: ended", worker_id, silent_s)
                self._heard_s[worker_id] = now_s
                self._watch.kill(worker_id)

    def _shut_down(self) -> None:
        while self._commands:
            self._commands.popleft()()
        self.control.roles.close(EngineClosed("the engine was closed while the role was changed"))
        self._fail_all(EngineClosed("the engine was closed while the request ran"))
        self._not_ready(EngineClosed("the engine was closed before it was ready"))
        for worker_id in self._waiting_for:  # still loading: it does not listen yet
            self._watch.kill(worker_id)
        alive = {worker_id for worker_id, totals in self.router.workers.items() if totals.is_alive}
        for worker_id in alive:
            self._send(worker_id, Shutdown())
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while alive - self._stopped.keys() and time.monotonic() < deadline_s:
            self._receive(TICK_S)
            alive -= {worker_id for worker_id, _ in self._watch.dead()}

    def _fail_all(self, error: KVRelayError) -> None:
        for request_id in list(self.router.requests):
            self.router.fail(request_id, error, time.monotonic())

    def _send(self, worker_id: WorkerId, message: Message) -> None:
        self._socket.send_multipart([worker_id.encode(), codec.encode(message)])
