"""One running set of workers, and requests through it: what `LLM`, `AsyncLLM` and the server stand on.

Knows text, workers and threads. Knows no tensors: this process never imports torch.
"""

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from kvrelay.config import EngineConfig, WorkerConfig, cache_home
from kvrelay.energy import METERS, RequestEnergy, parse_power_model
from kvrelay.errors import (
    ContextLengthExceeded,
    EngineClosed,
    InvalidConfig,
    InvalidRequest,
    KVRelayError,
    UnknownName,
)
from kvrelay.launch import open_workers
from kvrelay.metrics import Report
from kvrelay.models.hub import resolve
from kvrelay.models.spec import ModelSpec
from kvrelay.models.tokenizer import Tokenizer
from kvrelay.outputs import Detokenizer, InFlight, OutputStream, StreamEvent
from kvrelay.request_checks import check_kinds, check_layers, check_tokens
from kvrelay.router.local_prefill import hand_off_seconds, worthwhile_tokens
from kvrelay.router.policies import open_policy
from kvrelay.router.request import Operation, RoutedRequest, Update
from kvrelay.router.runtime import Runtime
from kvrelay.sampling_params import SamplingParams
from kvrelay.sparse import sparse_settings
from kvrelay.transport import is_in_process, parse_transport
from kvrelay.types import FinishReason, RequestId, Role, WorkerId

Prompt = str | Sequence[int]
logger = logging.getLogger("kvrelay")
CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that has been tokenised and found valid; `max_total_tokens` bounds prompt and output.

    `queue_timeout_s`, if not None, takes the place of the engine's. `traceparent` (W3C trace context) is the
    caller's span, `name` what the request's id begins with, `operation` what spans call it. All are set with
    `dataclasses.replace`.
    """

    prompt: str | None
    token_ids: list[int]
    max_total_tokens: int
    params: SamplingParams
    arrived_s: float
    queue_timeout_s: float | None = None
    traceparent: str | None = None
    name: str = "request"
    operation: Operation = "text_completion"


class Engine:
    """Starts the workers in its constructor; `close` stops them. Methods may be called from any thread.

    Raises `ModelError`, `InvalidConfig` or `WorkerFailed` when it cannot start; nothing is left running then.
    """

    def __init__(self, config: EngineConfig) -> None:
        _check_names(config)
        directory = resolve(config.model, cache_home())
        self.config = config
        self.spec = ModelSpec.from_directory(directory).scaled(config.rope_scaling)
        self.tokenizer = Tokenizer.from_directory(directory)
        self.max_model_len = _max_model_len(config, self.spec)
        check_layers(config.sparse(), self.spec)
        self._streams: dict[RequestId, OutputStream] = {}
        self._arrivals = itertools.count()
        self._lock = threading.Lock()
        self._is_closed = False
        self._workers = open_workers(config)
        endpoint = f"ipc://{self._workers.run_directory}/router"
        try:
            self._runtime = Runtime(config, self._workers, endpoint, self._on_update)
        except BaseException:
            self._workers.close(CLOSE_TIMEOUT_S)
            raise
        try:
            self._workers.start(self._worker_configs(endpoint, directory))
            self._runtime.wait_ready(config.start_timeout_s)
            if config.local_prefill_tokens == "auto" and not config.is_colocated:
                self._measure_local_prefill()
            self._runtime.control.open_books()
        except BaseException:
            self.close()
            raise

    def prepare(self, prompt: Prompt, params: SamplingParams) -> Prepared:
        """Tokenise and check one request; its clock starts. Raises `InvalidRequest` or `EngineClosed`."""
        if self._is_closed:
            raise EngineClosed("the engine is closed")
        check_kinds(prompt, params)
        arrived_s = time.monotonic()
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_length(len(token_ids))
        check_tokens(token_ids, self.spec.vocab_size)
        check_tokens([0, *params.stop_token_ids], self.spec.vocab_size, "stop_token_ids")
        check_tokens([0, *params.logit_bias], self.spec.vocab_size, "logit_bias")
        self._check_attention(params)
        max_total = min(len(token_ids) + params.max_tokens, self.max_model_len)
        self._runtime.router.fleet.check_fits(len(token_ids), max_total)
        text = prompt if isinstance(prompt, str) else None
        return Prepared(text, token_ids, max_total, params, arrived_s)

    def submit(self, prepared: Prepared, on_event: Callable[[StreamEvent], None]) -> RequestId:
        """Start one request; every outcome comes through `on_event`, exactly one of them the last.

        `on_event` is called on the router's thread and must neither block nor raise.
        """
        with self._lock:
            arrival = next(self._arrivals)
        params, token_ids = prepared.params, list(prepared.token_ids)
        request = RoutedRequest(
            request_id=RequestId(f"{prepared.name}-{arrival}"),
            arrival=arrival,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            max_total_tokens=prepared.max_total_tokens,
            deadline_s=_deadline_s(prepared),
            traceparent=prepared.traceparent,
            operation=prepared.operation,
        )
        stream = OutputStream(
            request=request,
            prompt=prepared.prompt,
            on_event=on_event,
            energy=self._energy,
            detokenizer=Detokenizer(self.tokenizer, token_ids, tuple(params.stop)),
            logprobs=[],
            sparse=self._runtime.router.fleet.sparse_of(params),
        )
        begun = self._runtime.call(lambda _: self._begin(stream, prepared.arrived_s))
        begun.add_done_callback(lambda future: self._if_not_begun(stream, future.exception()))
        return request.request_id

    def finish(self, request_id: RequestId, reason: FinishReason = "abort") -> None:
        """End a request early; its last event says so. A request that has ended is left alone."""
        self._runtime.call(lambda now_s: self._runtime.router.finish(request_id, reason, now_s))

    def fail_all(self, error: KVRelayError) -> None:
        """End every request in flight, and a change of role under way, with `error`."""
        self._runtime.fail_all(error)

    def report(self) -> Report:
        """What has been measured so far. Raises `EngineClosed` after `close`."""
        return self._runtime.call(self._runtime.control.measurement.report).result()

    def set_role(self, worker_id: str, role: Role) -> "Future[int]":
        """Change what a worker does: it is drained, connected, switched and verified by a real request.

        The future holds the worker's new role epoch, or the error for which the change was rolled back
        (`InvalidRequest` when it could not begin). Requests in flight end where they are, or move after 30 s.
        """
        return self._runtime.control.set_role(WorkerId(worker_id), role)

    def in_flight(self) -> list[InFlight]:
        """Requests that have not ended, the oldest first. Raises `EngineClosed` after `close`."""
        return self._runtime.call(
            lambda now_s: [stream.look(now_s) for stream in self._streams.values()]
        ).result()

    def slo(self) -> tuple[int, int]:
        """Requests that met `slo_ttft_s` and `slo_itl_s`, and those that did not: late, failed or refused."""
        return self._runtime.control.telemetry.slo()

    def metrics(self) -> bytes:
        """What `/metrics` shows, as Prometheus text (`kvrelay.metrics.CONTENT_TYPE`). See docs/metrics.md.

        Raises `EngineClosed` after `close`.
        """
        return self._runtime.call(self._runtime.control.metrics).result()

    def close(self) -> dict[str, int]:
        """Stop everything; unfinished requests end with `EngineClosed`. Safe to call twice.

        Returns KV blocks that did not come home, by worker that had time to say so.
        """
        self._is_closed = True
        leaked = self._runtime.close()
        self._workers.close(CLOSE_TIMEOUT_S)
        return {str(worker_id): count for worker_id, count in leaked.items()}

    def _measure_local_prefill(self) -> None:
        """Set how long a prompt may be to stay on decode, from what a hand-off costs on this host."""
        fleet = self._runtime.router.fleet
        prefill, decode = fleet.alive("prefill")[0], fleet.alive("decode")[0]
        hand_off_s = hand_off_seconds(self._runtime.control.probe, prefill.worker_id, decode.worker_id)
        fleet.local_prefill_tokens = worthwhile_tokens(hand_off_s, decode.prefill_seconds(1))
        logger.info(
            "a hand-off costs %.2f ms: prompts of up to %d tokens stay on decode",
            1e3 * hand_off_s,
            fleet.local_prefill_tokens,
        )

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens >= self.max_model_len:
            raise ContextLengthExceeded(
                f"prompt: it has {num_tokens} tokens; max_model_len={self.max_model_len} "
                "must leave room for at least one more"
            )

    def _check_attention(self, params: SamplingParams) -> None:
        if params.attention is None:
            return
        chosen = sparse_settings(params.attention)
        if chosen is not None and self.config.sparse() is None:
            raise InvalidRequest(
                "attention: the engine was started with attention='dense' and keeps no block statistics; "
                "start it with 'auto' or 'sparse'"
            )
        try:
            check_layers(chosen, self.spec)
        except InvalidConfig as error:
            raise InvalidRequest(str(error)) from None

    def _begin(self, stream: OutputStream, arrived_s: float) -> None:
        self._streams[stream.request.request_id] = stream
        self._runtime.router.submit(stream.request, arrived_s)

    def _if_not_begun(self, stream: OutputStream, error: BaseException | None) -> None:
        """A request that could not even be handed to the router still ends, with the reason."""
        if error is None:
            return
        if not isinstance(error, KVRelayError):
            error = KVRelayError(f"the request could not be started: {type(error).__name__}: {error}")
        self._streams.pop(stream.request.request_id, None)
        stream.on_event(StreamEvent(request_id=stream.request.request_id, error=error))

    def _on_update(self, update: Update) -> None:
        stream = self._streams.get(update.request_id)
        if stream is None:  # its owner raised before
            return
        if update.error is not None or update.finish_reason is not None:
            del self._streams[update.request_id]
        try:
            is_stopped = stream.on_update(update)
        except Exception:
            logger.exception("the owner of %s raised; the request is aborted", update.request_id)
            self._streams.pop(update.request_id, None)
            self._runtime.router.finish(update.request_id, "abort", update.at_s)
            return
        if is_stopped:
            self._runtime.router.finish(update.request_id, "stop", update.at_s)

    def _energy(self, request_id: RequestId) -> RequestEnergy:
        return self._runtime.control.measurement.request_energy(request_id)

    def _worker_configs(self, endpoint: str, directory: Path) -> list[WorkerConfig]:
        roles = self.config.roles()
        return [
            WorkerConfig(
                worker_id=worker_id,
                role=role,
                index=index,
                epoch=1,
                endpoint=endpoint,
                run_directory=self._workers.run_directory,
                model_directory=str(directory),
                num_threads=self.config.worker_threads(worker_id),
                cores=() if is_in_process(self.config.transport) else self.config.worker_cores(worker_id),
                num_workers=len(roles),
                engine=self.config.of_worker(worker_id),
            )
            for index, (worker_id, role) in enumerate(roles)
        ]


def _deadline_s(prepared: Prepared) -> float | None:
    timeout_s = prepared.queue_timeout_s
    if timeout_s is not None and not timeout_s > 0:
        raise InvalidRequest(f"queue_timeout_s={timeout_s!r}: expected seconds above 0, or None")
    return None if timeout_s is None else prepared.arrived_s + timeout_s


def _check_names(config: EngineConfig) -> None:
    """What can be refused before anything is started, is."""
    open_policy(config.policy)
    parse_transport(config.transport)
    if config.meter not in (*METERS, "auto"):
        raise UnknownName(f"meter={config.meter!r}: expected one of {', '.join(sorted([*METERS, 'auto']))}")
    powers = config.powers()
    if powers is not None:
        parse_power_model(powers)
    if config.policy == "energy_aware" and config.meter == "none":
        raise InvalidConfig("policy='energy_aware' needs joules; meter='none' measures none")


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    asked, trained = config.max_model_len, spec.max_position_embeddings
    if asked is not None and asked > trained:
        raise InvalidConfig(
            f"max_model_len={asked}: the model has {trained} positions; "
            "rope_scaling='yarn:FACTOR' gives it FACTOR times as many"
        )
    return asked or trained
