"""The router's decisions: which worker does what, and what happens when one of them fails.

Pure: messages and times come in as arguments, messages to workers and updates to owners go out through two
callables. Knows no sockets, processes, clocks or text, so it runs under a virtual clock as it is.
"""

from collections.abc import Callable

from kvrelay.errors import ERRORS, KVRelayError, PoolTooSmall, WorkerFailed
from kvrelay.metrics import WorkerTotals
from kvrelay.router.policies import Load, Policy
from kvrelay.router.request import RoutedRequest, Update
from kvrelay.types import FinishReason, RequestId, TicketId, WorkerId, num_blocks
from kvrelay.wire import (
    Abort,
    AttemptFailed,
    CacheChanged,
    Heartbeat,
    Hello,
    Mark,
    Message,
    NewToken,
    Preempted,
    Prefill,
    Reserve,
    Reserved,
    StepReport,
    WriterGone,
)

MAX_FAILURES = 8
MAX_DEATHS = 2  # of workers under one request, before it is taken for the cause


class Router:
    """Every request that is submitted ends with exactly one update that has a finish reason or an error."""

    def __init__(
        self, policy: Policy, send: Callable[[WorkerId, Message], None], deliver: Callable[[Update], None]
    ) -> None:
        self._policy, self._send, self._deliver = policy, send, deliver
        self.workers: dict[WorkerId, WorkerTotals] = {}
        self.requests: dict[RequestId, RoutedRequest] = {}
        self.num_ended = {"finished": 0, "aborted": 0, "failed": 0, "preempted": 0, "retried": 0}
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self._first_arrival_s: float | None = None
        self._last_delivery_s = 0.0
        self._loads: dict[WorkerId, Load] = {}
        self._writers: dict[TicketId, tuple[WorkerId, WorkerId]] = {}

    def add_worker(self, hello: Hello) -> None:
        """A worker is ready for requests."""
        self.workers[hello.worker_id] = WorkerTotals(hello)
        self._loads[hello.worker_id] = Load(hello.worker_id)

    def check_fits(self, num_prompt_tokens: int, max_total_tokens: int) -> None:
        """Raise `PoolTooSmall` when no worker could ever hold the request, alone."""
        needed = num_blocks(max_total_tokens)
        for role in ("prefill", "decode"):
            pools = {load.worker_id: self._num_blocks(load.worker_id) for load in self._alive(role)}
            if pools and max(pools.values()) < needed:
                largest = max(pools, key=lambda worker_id: pools[worker_id])
                raise PoolTooSmall(
                    f"the request may need {needed} KV blocks ({num_prompt_tokens} prompt tokens, "
                    f"{max_total_tokens - num_prompt_tokens} to generate); the pool of "
                    f"{largest} has {pools[largest]}"
                )

    def submit(self, request: RoutedRequest, now_s: float) -> None:
        """Take a request; it ends through `deliver`, even when no worker is left."""
        self.requests[request.request_id] = request
        self.num_prompt_tokens += request.num_prompt_tokens
        self._first_arrival_s = now_s if self._first_arrival_s is None else self._first_arrival_s
        request.ledger.add("arrived", now_s)
        self._dispatch(request, now_s)

    def finish(self, request_id: RequestId, reason: FinishReason, now_s: float) -> None:
        """End a request from outside: its owner lost interest, or found a stop string. Idempotent."""
        request = self.requests.get(request_id)
        if request is not None:
            self._cancel_attempt(request)
            self._end(request, Update(request_id=request_id, finish_reason=reason, at_s=now_s))

    def fail(self, request_id: RequestId, error: KVRelayError, now_s: float) -> None:
        """End a request from outside with an error. Idempotent."""
        request = self.requests.get(request_id)
        if request is not None:
            self._cancel_attempt(request)
            self._end(request, Update(request_id=request_id, error=error, at_s=now_s))

    def on_message(self, message: Message, now_s: float) -> None:
        """A message from a worker. One about an attempt that is over changes nothing but the totals."""
        match message:
            case StepReport():
                self._on_step(message, now_s)
            case Heartbeat():
                self.workers[message.worker_id].heartbeat = message
            case CacheChanged():
                self._loads[message.worker_id].change_cached(message.added, message.removed)
            case WriterGone():
                self._on_writer_gone(message)
            case Reserved():
                self._on_reserved(message, now_s)
            case Mark():
                self._on_mark(message)
            case Preempted():
                self._on_preempted(message, now_s)
            case AttemptFailed():
                self._on_attempt_failed(message, now_s)

    def on_worker_dead(self, worker_id: WorkerId, reason: str, now_s: float) -> None:
        """A worker is gone for good: nothing of it writes any more, and its requests move on."""
        self.workers[worker_id].is_alive = False
        for ticket_id, (writer, decode) in list(self._writers.items()):
            if writer == worker_id:
                self._on_writer_gone(WriterGone(ticket_id=ticket_id, decode_worker=decode))
        error = WorkerFailed(f"{worker_id} died: {reason}")
        for request in list(self.requests.values()):
            needs_prefill = request.prefill == worker_id and not request.is_committed
            if needs_prefill or request.decode == worker_id:
                request.num_deaths += 1
                self._retry(request, error, now_s)

    def window_s(self, now_s: float) -> float:
        """Seconds from the first arrival to the last delivery, or to `now_s` while requests run."""
        if self._first_arrival_s is None:
            return 0.0
        return (now_s if self.requests else self._last_delivery_s) - self._first_arrival_s

    def is_current(self, message: Mark | Reserved | Preempted | AttemptFailed | NewToken) -> bool:
        """Whether the message is about an attempt that is still going on."""
        request = self.requests.get(message.request_id)
        return request is not None and request.attempt == message.attempt

    def has_work(self, worker_id: WorkerId) -> bool:
        """Whether any request is waiting for this worker."""
        owes_writer_gone = any(writer == worker_id for writer, _ in self._writers.values())
        requests = self.requests.values()
        return owes_writer_gone or any(worker_id in (request.prefill, request.decode) for request in requests)

    def _on_step(self, step: StepReport, now_s: float) -> None:
        self.workers[step.worker_id].add(step)
        for token in step.tokens:
            if self.is_current(token):
                self._on_token(self.requests[token.request_id], token, now_s)

    def _on_token(self, request: RoutedRequest, token: NewToken, now_s: float) -> None:
        request.token_ids.append(token.token_id)
        request.ledger.token(now_s)
        self.num_output_tokens += 1
        update = Update(
            request_id=request.request_id,
            token_id=token.token_id,
            logprobs=token.logprobs,
            finish_reason=token.finish_reason,
            at_s=now_s,
        )
        if token.finish_reason is None:
            self._deliver(update)
        else:
            self._end(request, update)

    def _on_reserved(self, message: Reserved, now_s: float) -> None:
        ticket = message.ticket
        if not self.is_current(message):
            if ticket is not None:  # nobody was told of it, so nobody will write
                self._say(ticket.decode_worker, _gone(ticket.ticket_id, ticket.decode_worker))
            return
        request = self.requests[message.request_id]
        request.ticket = ticket
        if ticket is None:
            return
        assert request.prefill is not None
        request.is_dispatched = True
        self._writers[ticket.ticket_id] = (request.prefill, ticket.decode_worker)
        self._say(request.prefill, Prefill(request=request.spec(), ticket=ticket))

    def _on_mark(self, message: Mark) -> None:
        if not self.is_current(message):
            return
        request = self.requests[message.request_id]
        request.ledger.add(message.event, message.at_s)
        if message.event == "prefill_finished":
            self._unload_prefill(request)
        if message.event == "kv_committed":
            self._unload_prefill(request)
            request.is_committed = True
            if request.ticket is not None:
                self._writers.pop(request.ticket.ticket_id, None)

    def _on_writer_gone(self, message: WriterGone) -> None:
        self._writers.pop(message.ticket_id, None)
        self._say(message.decode_worker, message)

    def _on_preempted(self, message: Preempted, now_s: float) -> None:
        if self.is_current(message):
            request = self.requests[message.request_id]
            self.num_ended["preempted"] += 1
            self._unload(request)
            request.ledger.add("requeued", now_s)
            self._dispatch(request, now_s)

    def _on_attempt_failed(self, message: AttemptFailed, now_s: float) -> None:
        if not self.is_current(message):
            return
        request = self.requests[message.request_id]
        error = ERRORS.get(message.error, KVRelayError)(message.message)
        if message.retryable:
            self._retry(request, error, now_s)
        else:
            self.fail(request.request_id, error, now_s)

    def _retry(self, request: RoutedRequest, error: KVRelayError, now_s: float) -> None:
        self._cancel_attempt(request)
        request.num_failures += 1
        if request.num_failures > MAX_FAILURES or request.num_deaths > MAX_DEATHS:
            error = type(error)(f"gave up after {request.num_failures} attempts; the last: {error}")
            self._end(request, Update(request_id=request.request_id, error=error, at_s=now_s))
            return
        self.num_ended["retried"] += 1
        self._unload(request)
        request.ledger.add("requeued", now_s)
        self._dispatch(request, now_s, error)

    def _dispatch(self, request: RoutedRequest, now_s: float, cause: KVRelayError | None = None) -> None:
        needed = num_blocks(request.max_total_tokens)
        prefills = [load for load in self._alive("prefill") if self._num_blocks(load.worker_id) >= needed]
        decodes = [load for load in self._alive("decode") if self._num_blocks(load.worker_id) >= needed]
        if not prefills or not decodes:
            error = cause or self._no_room("decode" if prefills else "prefill", request)
            self._end(request, Update(request_id=request.request_id, error=error, at_s=now_s))
            return
        decode = self._policy.decode(decodes)
        prefill = self._policy.prefill(prefills)
        if self.workers[decode].hello.role == "colocated":
            prefill = decode
        request.begin_attempt(prefill, decode)
        self._loads[prefill].num_prefill_tokens += request.attempt_tokens
        self._loads[decode].num_requests += 1
        self._say(decode, Reserve(request=request.spec()))

    def _no_room(self, role: str, request: RoutedRequest) -> KVRelayError:
        try:
            self.check_fits(request.num_prompt_tokens, request.max_total_tokens)
        except PoolTooSmall as error:
            return error
        return WorkerFailed(f"no {role} worker is alive")

    def _num_blocks(self, worker_id: WorkerId) -> int:
        return self.workers[worker_id].hello.descriptor.num_blocks

    def _cancel_attempt(self, request: RoutedRequest) -> None:
        """Stop both sides. Decode keeps the ticket's blocks until the writer has said that it is gone."""
        abort = Abort(request_id=request.request_id, attempt=request.attempt)
        if request.decode is not None:
            self._say(request.decode, abort)
        ticket = request.ticket
        if ticket is None or request.is_committed or request.prefill is None:
            return
        if self.workers[request.prefill].is_alive:
            self._say(
                request.prefill,
                Abort(request_id=request.request_id, attempt=request.attempt, ticket=ticket),
            )

    def _end(self, request: RoutedRequest, update: Update) -> None:
        kind = "failed" if update.error else "aborted" if update.finish_reason == "abort" else "finished"
        self.num_ended[kind] += 1
        self._unload(request)
        del self.requests[request.request_id]
        self._last_delivery_s = update.at_s
        self._deliver(update)

    def _unload_prefill(self, request: RoutedRequest) -> None:
        if request.prefill is not None and not request.is_prefilled:
            request.is_prefilled = True
            self._loads[request.prefill].num_prefill_tokens -= request.attempt_tokens

    def _unload(self, request: RoutedRequest) -> None:
        self._unload_prefill(request)
        if request.decode is not None:
            self._loads[request.decode].num_requests -= 1
        request.prefill = request.decode = None

    def _alive(self, phase: str) -> list[Load]:
        roles = (phase, "colocated")
        return [
            self._loads[worker_id]
            for worker_id, totals in self.workers.items()
            if totals.is_alive and totals.hello.role in roles
        ]

    def _say(self, worker_id: WorkerId, message: Message) -> None:
        if self.workers[worker_id].is_alive:
            self._send(worker_id, message)


def _gone(ticket_id: TicketId, decode_worker: WorkerId) -> WriterGone:
    return WriterGone(ticket_id=ticket_id, decode_worker=decode_worker)
