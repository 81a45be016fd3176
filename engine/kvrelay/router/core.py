"""The router's decisions: which worker does what, and what happens when one of them fails.

Pure: messages and times come in as arguments, messages to workers and updates to owners go out through two
callables. Knows no sockets, processes, clocks or text, so it runs under a virtual clock as it is.
"""

from collections.abc import Callable

from kvrelay.errors import ERRORS, KVRelayError, WorkerFailed
from kvrelay.router.admission import WaitingQueue, overdue
from kvrelay.router.counts import RunCounts
from kvrelay.router.dispatch import may_begin, next_start
from kvrelay.router.fleet import Fleet
from kvrelay.router.load import Pair
from kvrelay.router.policies import Policy
from kvrelay.router.request import Observer, RoutedRequest, Update, update_of
from kvrelay.router.settings import RouterSettings
from kvrelay.router.writers import Writers
from kvrelay.types import FinishReason, RequestId, WorkerId
from kvrelay.wire import (
    AttemptFailed,
    CacheChanged,
    Heartbeat,
    Mark,
    Message,
    NewToken,
    Preempted,
    Prefill,
    PromptScored,
    Reserve,
    Reserved,
    StepReport,
    Wanted,
    WriterGone,
)

OfAttempt = Mark | PromptScored | Preempted | AttemptFailed
MAX_FAILURES = 8
MAX_DEATHS = 2  # of workers under one request, before it is taken for the cause


class Router:
    """Every request that `submit` takes ends with exactly one update that has a finish reason or an error.

    A request waits in `queue` until a pair can take it; what workers hold is bounded by their slots and
    blocks, so that the limit on `queue` bounds how long an accepted request waits for its first token.
    """

    def __init__(
        self,
        policy: Policy,
        send: Callable[[WorkerId, Message], None],
        deliver: Callable[[Update], None],
        settings: RouterSettings | None = None,
    ) -> None:
        self.policy, self._send, self._deliver = policy, send, deliver
        self.settings = settings or RouterSettings()
        self.fleet = Fleet(self.settings)
        self.workers = self.fleet.workers
        self.queue = WaitingQueue(self.settings.max_queued_requests)
        self.observer: Observer | None = None
        self.requests: dict[RequestId, RoutedRequest] = {}
        self.counts = RunCounts()
        self._writers = Writers()

    def submit(self, request: RoutedRequest, now_s: float) -> None:
        """Take a request; it ends through `deliver`, even when no worker is left.

        Raises `Overloaded`, taking nothing, when no pair can start on it now and the queue is full. Requests
        of our own, which are not counted, are never refused.
        """
        if request.is_counted and (self.queue.first is not None or not may_begin(request, self.fleet, now_s)):
            self.queue.check_room(now_s)
        if request.deadline_s is None and self.settings.queue_timeout_s is not None:
            request.deadline_s = now_s + self.settings.queue_timeout_s
        self.requests[request.request_id] = request
        if request.is_counted:
            self.counts.arrived(request, now_s)
        request.ledger.add("arrived", now_s)
        self._enqueue(request, now_s)

    def tick(self, now_s: float) -> None:
        """Give up what is past its deadline, and try again what waits. Call it every few milliseconds."""
        for request, error in overdue(self.requests.values(), now_s):
            self.fail(request.request_id, error, now_s)
        self._pump(now_s)

    def finish(self, request_id: RequestId, reason: FinishReason, now_s: float) -> None:
        """End a request from outside: its owner lost interest, or found a stop string. Idempotent."""
        self._stop(Update(request_id=request_id, finish_reason=reason, at_s=now_s))

    def fail(self, request_id: RequestId, error: KVRelayError, now_s: float) -> None:
        """End a request from outside with an error. Idempotent."""
        self._stop(Update(request_id=request_id, error=error, at_s=now_s))

    def on_message(self, message: Message, now_s: float) -> None:
        """A message from a worker. One about an attempt that is over changes nothing but the totals."""
        if isinstance(message, OfAttempt) and not self.is_current(message):
            return
        match message:
            case StepReport():
                self._on_step(message, now_s)
            case Heartbeat():
                self.workers[message.worker_id].heartbeat = message
            case CacheChanged():
                self.fleet.loads[message.worker_id].change_cached(message.added, message.removed)
            case WriterGone():
                self._on_writer_gone(message)
            case Wanted():
                writer = self._writers.writer_of(message.ticket_id)
                if writer is not None:
                    self._say(writer, message)
            case Reserved():
                self._on_reserved(message, now_s)
            case Mark():
                self._on_mark(message, now_s)
            case PromptScored():
                self._on_prompt_scored(message, now_s)
            case Preempted():
                self._on_preempted(message, now_s)
            case AttemptFailed():
                self._on_attempt_failed(message, now_s)

    def on_worker_dead(self, worker_id: WorkerId, reason: str, now_s: float) -> None:
        """A worker is gone for good: nothing of it writes any more, and its requests move on."""
        self.workers[worker_id].is_alive = False
        for gone in self._writers.of(worker_id):
            self._on_writer_gone(gone)
        error = WorkerFailed(f"{worker_id} died: {reason}")
        for request in list(self.requests.values()):
            if request.is_on(worker_id):
                request.num_deaths += 1
                self._retry(request, error, now_s)

    def is_current(self, message: OfAttempt | Reserved | NewToken) -> bool:
        """Whether the message is about an attempt that is still going on."""
        request = self.requests.get(message.request_id)
        return request is not None and request.decode is not None and request.attempt == message.attempt

    def has_work(self, worker_id: WorkerId) -> bool:
        """Whether anything is waiting for this worker, or for its end as a writer."""
        load = self.fleet.loads[worker_id]
        return bool(load.num_prompts or load.num_requests) or self._writers.involve(worker_id)

    def move_away(self, worker_id: WorkerId, now_s: float) -> None:
        """Requests of a living worker go on elsewhere, as after a preemption."""
        for request in list(self.requests.values()):
            if request.is_on(worker_id):
                self._cancel_attempt(request)
                self._requeue(request, now_s)

    def _on_step(self, step: StepReport, now_s: float) -> None:
        self.fleet.add_step(step)
        for request_id in step.attention.keys() | step.moved_s.keys() | step.hand_off.keys():
            request = self.requests.get(RequestId(request_id))
            if request is not None:
                request.on_step(step)
        for request_id, count in step.unfinished.items():
            request = self.requests.get(RequestId(request_id))
            if request is not None and request.is_on(step.worker_id):
                self._on_progress(request, count, now_s)
        for token in reversed(step.tokens):  # the newest request's first: its first token is most waited for
            if self.is_current(token):
                self._on_token(self.requests[token.request_id], token, now_s)
        if step.tokens:
            self._pump(now_s)

    def _on_progress(self, request: RoutedRequest, count: int, now_s: float) -> None:
        request.num_prefilled = min(count, request.num_prompt_tokens)  # tokens delivered are computed again
        update = Update(request_id=request.request_id, num_prefilled=request.num_prefilled, at_s=now_s)
        self._deliver(update)

    def _on_token(self, request: RoutedRequest, token: NewToken, now_s: float) -> None:
        if request.owes_prompt_logprobs:
            request.held.append(token)
            return
        request.token_ids.append(token.token_id)
        request.ledger.token(now_s)
        self.fleet.grow(request)
        if request.is_counted:
            self.counts.num_output_tokens += 1
            if self.observer is not None:
                self.observer.on_token(request)
        update = update_of(token, now_s)
        if token.finish_reason is None:
            self._deliver(update)
        else:
            if not request.is_committed:
                self._cancel_attempt(request)  # the rest of its KV is of no more use
            self._end(request, update)

    def _on_prompt_scored(self, message: PromptScored, now_s: float) -> None:
        request = self.requests[message.request_id]
        request.prompt_logprobs += message.logprobs
        if not request.owes_prompt_logprobs:
            held, request.held = request.held, []
            for token in held:
                if self.is_current(token):  # its owner may end it at any token
                    self._on_token(request, token, now_s)
            self._pump(now_s)

    def _on_reserved(self, message: Reserved, now_s: float) -> None:
        ticket = message.ticket
        if not self.is_current(message):
            if ticket is not None:  # nobody was told of it, so nobody will write
                gone = WriterGone(ticket_id=ticket.ticket_id, decode_worker=ticket.decode_worker)
                self._say(ticket.decode_worker, gone)
            return
        request = self.requests[message.request_id]
        request.ticket = ticket
        if self.observer is not None and request.is_counted:
            self.observer.on_reserved(request, message.at_s - request.reserved_at_s)
        if ticket is None:
            request.note_cached(message.num_cached_tokens)
        elif request.prefill is not None:
            self._writers.add(ticket, request.prefill)
            self._say(request.prefill, Prefill(request=request.spec(), ticket=ticket))

    def _on_mark(self, message: Mark, now_s: float) -> None:
        request = self.requests[message.request_id]
        request.on_mark(message)
        if message.event in ("prefill_finished", "kv_committed"):
            self.fleet.unload_prefill(request)
        if message.event in ("kv_usable", "kv_committed"):
            self.fleet.succeeded(request)
        if message.event == "kv_committed":
            request.is_committed = True
            if request.ticket is not None:
                self._writers.discard(request.ticket.ticket_id)
        self._pump(now_s)

    def _on_writer_gone(self, message: WriterGone) -> None:
        self._writers.discard(message.ticket_id)
        self._say(message.decode_worker, message)

    def _on_preempted(self, message: Preempted, now_s: float) -> None:
        self.counts.num_ended["preempted"] += 1
        self._requeue(self.requests[message.request_id], now_s)

    def _on_attempt_failed(self, message: AttemptFailed, now_s: float) -> None:
        request = self.requests[message.request_id]
        error = ERRORS.get(message.error, KVRelayError)(message.message)
        if self.observer is not None:
            self.observer.on_attempt_failed(error)
        if message.retryable:
            self.fleet.failed(request, now_s)
            self._retry(request, error, now_s)
        else:
            self.fail(request.request_id, error, now_s)

    def _retry(self, request: RoutedRequest, error: KVRelayError, now_s: float) -> None:
        self._cancel_attempt(request)
        request.num_failures += 1
        request.last_error = error
        if request.num_failures > MAX_FAILURES or request.num_deaths > MAX_DEATHS:
            error = type(error)(f"gave up after {request.num_failures} attempts; the last: {error}")
            self._end(request, Update(request_id=request.request_id, error=error, at_s=now_s))
            return
        self.counts.num_ended["retried"] += 1
        self._requeue(request, now_s)

    def _requeue(self, request: RoutedRequest, now_s: float) -> None:
        self.fleet.unload(request)
        request.num_prefilled = 0
        request.ledger.add("requeued", now_s)
        self._enqueue(request, now_s)

    def _enqueue(self, request: RoutedRequest, now_s: float) -> None:
        self.queue.add(request)
        self._pump(now_s)

    def _pump(self, now_s: float) -> None:
        """Start what waits, in order, for as long as the first of the queue finds a pair or its end."""
        while (turn := next_start(self.queue, self.fleet, self.policy, now_s)) is not None:
            request, found = turn
            if isinstance(found, Pair):
                self._begin(request, found, now_s)
            else:
                self._end(request, Update(request_id=request.request_id, error=found, at_s=now_s))

    def _begin(self, request: RoutedRequest, pair: Pair, now_s: float) -> None:
        self.fleet.take(request, pair, now_s)
        self.queue.on_dispatched(now_s)
        request.reserved_at_s = now_s
        self._say(pair.decode.worker_id, Reserve(request=request.spec()))

    def _stop(self, update: Update) -> None:
        request = self.requests.get(update.request_id)
        if request is not None:
            self._cancel_attempt(request)
            self._end(request, update)
            self._pump(update.at_s)

    def _cancel_attempt(self, request: RoutedRequest) -> None:
        for worker_id, abort in request.aborts():
            self._say(worker_id, abort)

    def _end(self, request: RoutedRequest, update: Update) -> None:
        self.queue.remove(request)
        self.fleet.unload(request)
        del self.requests[request.request_id]
        if request.is_counted:
            self.counts.ended(request, update)
            if self.observer is not None:
                self.observer.on_end(request, update)
        self._deliver(update)

    def _say(self, worker_id: WorkerId, message: Message) -> None:
        if self.workers[worker_id].is_alive:
            self._send(worker_id, message)
