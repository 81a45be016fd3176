"""What the two sides of a worker share."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvrelay.cache.pool import BlockPool
from kvrelay.cache.prefix import Prefixes
from kvrelay.cache.store import KVStore
from kvrelay.config import WorkerConfig
from kvrelay.errors import WorkerFailed
from kvrelay.runner import Runner
from kvrelay.transport.base import Transport
from kvrelay.types import LifeEvent, RequestSpec
from kvrelay.wire import AttemptFailed, Mark, Message
from kvrelay.worker.backing import PageBacking


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerParts:
    """One worker's model, pages and ways out; `send` speaks to the router, `backing` is the pool's."""

    config: WorkerConfig
    pool: BlockPool
    store: KVStore
    runner: Runner
    transport: Transport
    send: Callable[[Message], None]
    counters: Counter[str] = field(default_factory=Counter)
    backing: PageBacking | None = None

    def close(self) -> None:
        """Let go of what others could use; what has not been sent or written is lost."""
        if self.backing is not None:
            self.backing.let_go()
        self.transport.close()

    @property
    def prefixes(self) -> Prefixes:
        """How this worker names full blocks; not at all when the prefix cache is off."""
        engine = self.config.engine
        return Prefixes(self.store.layout.fingerprint() if engine.prefix_cache else None, engine.attention)

    def count_cached(self, num_tokens: int, num_cached: int) -> None:
        """A request looked for the KV of `num_tokens` tokens and found that of the first `num_cached`."""
        self.counters["prefix_cache_queries"] += num_tokens
        self.counters["prefix_cache_hits"] += num_cached

    def mark(
        self, request: RequestSpec, event: LifeEvent, at_s: float | None = None, num_cached_tokens: int = 0
    ) -> None:
        """Tell the router that the request reached a point in its life."""
        self.send(
            Mark(
                request_id=request.request_id,
                attempt=request.attempt,
                event=event,
                at_s=time.monotonic() if at_s is None else at_s,
                num_cached_tokens=num_cached_tokens,
            )
        )

    def fail_step(self, requests: Iterable[RequestSpec], error: RuntimeError) -> None:
        """Tell the router that a step could not be computed (out of memory, say): its attempts are over."""
        worker_id = self.config.worker_id
        for request in requests:
            reason = f"{worker_id} could not compute a step: {type(error).__name__}: {error}"
            self.fail(request, WorkerFailed(reason), retryable=True)

    def fail(self, request: RequestSpec, error: Exception, *, retryable: bool) -> None:
        """Tell the router that the attempt is over, and why."""
        self.send(
            AttemptFailed(
                request_id=request.request_id,
                attempt=request.attempt,
                error=type(error).__name__,
                message=str(error),
                retryable=retryable,
            )
        )
