"""The workers as the router sees them: who is alive, what each owes, and which pairs can take a request now.

Pure: keeps books, decides nothing and sends nothing.
"""

from collections.abc import Sequence

from kvrelay.cache.prefix import Prefixes
from kvrelay.errors import KVRelayError, NoWorker, PoolTooSmall, WorkerFailed
from kvrelay.metrics import WorkerTotals
from kvrelay.router.load import Job, Load, Pair
from kvrelay.router.request import RoutedRequest
from kvrelay.router.settings import RouterSettings
from kvrelay.sampling_params import SamplingParams
from kvrelay.sparse import SparseAttention, settings_of, sparse_settings
from kvrelay.types import KVLayout, Phase, WorkerId, num_blocks
from kvrelay.wire import Hello, StepReport

PAIR: tuple[Phase, Phase] = ("prefill", "decode")


class Fleet:
    """Workers, and the loads that requests put on them.

    Prompts of which a decode worker has all but `local_prefill_tokens` tokens are computed there; 0: never.
    """

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self.local_prefill_tokens = settings.local_prefill_tokens
        self.workers: dict[WorkerId, WorkerTotals] = {}
        self.loads: dict[WorkerId, Load] = {}

    def add(self, hello: Hello, max_num_seqs: int = 64, chunk_tokens: int | None = 512) -> None:
        """A worker is ready. `chunk_tokens` is its prefill budget, None when it computes prompts whole."""
        self.workers[hello.worker_id] = WorkerTotals(hello)
        self.loads[hello.worker_id] = Load(
            hello.worker_id,
            role=hello.role,
            num_blocks=hello.descriptor.num_blocks,
            max_num_seqs=max_num_seqs,
            chunk_tokens=chunk_tokens or 0,
        )

    @property
    def _layout(self) -> KVLayout:
        """That of all workers: others do not pair."""
        return next(iter(self.workers.values())).hello.descriptor.layout

    def alive(self, phase: Phase) -> list[Load]:
        """Living workers of a phase's role."""
        roles = (phase, "colocated")
        return [
            load
            for worker_id, load in self.loads.items()
            if load.role in roles and self.workers[worker_id].is_alive
        ]

    def check_fits(self, num_prompt_tokens: int, max_total_tokens: int) -> None:
        """Raise `PoolTooSmall` when no worker could ever hold the request, alone."""
        for phase in PAIR:
            error = self._too_small(self.alive(phase), num_prompt_tokens, max_total_tokens)
            if error is not None:
                raise error

    def why_never(self, request: RoutedRequest) -> KVRelayError | None:
        """Why no living workers could ever serve the request; None when some could."""
        if request.pinned is not None:
            dead = [worker_id for worker_id in request.pinned if not self.workers[worker_id].is_alive]
            return request.last_error or WorkerFailed(f"{dead[0]} is not alive") if dead else None
        for phase in PAIR:
            alive = self.alive(phase)
            if not alive:
                last = "" if request.last_error is None else f"; the last attempt: {request.last_error}"
                return NoWorker(f"no {phase} worker is alive{last}")
            error = self._too_small(alive, request.num_prompt_tokens, request.max_total_tokens)
            if error is not None:
                return request.last_error or error
        return None

    def sparse_of(self, params: SamplingParams) -> SparseAttention | None:
        """The settings of a request with these parameters, `"auto"` as numbers; None is dense."""
        sparse, measured = sparse_settings(self._settings.attention), self._layout
        if sparse is not None and measured.dense_below_tokens is not None:
            sparse = sparse.with_crossover(measured.dense_below_tokens, measured.decode_dense_below_tokens)
        return settings_of(params.attention, sparse)

    def job(self, request: RoutedRequest) -> Job:
        """The request as policies see it."""
        is_any_cached = any(load.cached for load in self.loads.values())
        return Job(
            num_tokens=request.num_prefill_tokens,
            max_new_tokens=request.max_total_tokens - len(request.token_ids),
            num_others=sum(load.num_requests for load in self.loads.values()),
            block_hashes=self._names(request) if is_any_cached else (),
            slo_ttft_s=self._settings.slo_ttft_s,
            slo_itl_s=self._settings.slo_itl_s,
        )

    def pairs(self, request: RoutedRequest, job: Job, now_s: float) -> list[Pair]:
        """Pairs that can take the request now; without workers whose breaker is open, if others remain."""
        if request.pinned is not None:
            return [Pair(*(self.loads[worker_id] for worker_id in request.pinned))]
        needed = num_blocks(request.max_total_tokens)
        prefills, decodes = (
            _usable([load for load in self.alive(phase) if load.num_blocks >= needed], request, now_s)
            for phase in PAIR
        )
        found: list[Pair] = []
        for decode in decodes:
            num_cached = decode.num_cached_tokens(job.block_hashes)
            if not decode.can_decode(num_blocks(len(request.token_ids)) - num_blocks(num_cached)):
                continue
            if decode.role == "colocated" or self._stays_local(decode, job.num_tokens, num_cached):
                found += [Pair(decode, decode)] if decode.can_prefill() else []
            else:
                found += [Pair(load, decode) for load in prefills if load.can_prefill()]
        return found

    def take(self, request: RoutedRequest, pair: Pair, now_s: float) -> None:
        """Count a new attempt of the request on this pair."""
        request.begin_attempt(pair.prefill.worker_id, pair.decode.worker_id)
        request.last_pair = (pair.prefill.worker_id, pair.decode.worker_id)
        pair.prefill.num_prefill_tokens += request.attempt_tokens
        pair.prefill.num_prompts += 1
        pair.decode.num_requests += 1
        num_cached = pair.decode.num_cached_tokens(self.job(request).block_hashes)
        request.num_blocks_shared = num_blocks(num_cached)
        request.num_blocks_held = num_blocks(len(request.token_ids)) - request.num_blocks_shared
        pair.decode.num_used_blocks += request.num_blocks_held
        for load in {pair.prefill.worker_id: pair.prefill, pair.decode.worker_id: pair.decode}.values():
            load.breaker.on_sent(request.request_id, now_s)

    def grow(self, request: RoutedRequest) -> None:
        """A token was delivered: the request may have grown by a block."""
        added = num_blocks(len(request.token_ids)) - request.num_blocks_shared - request.num_blocks_held
        if added and request.decode is not None:
            request.num_blocks_held += added
            self.loads[request.decode].num_used_blocks += added

    def unload_prefill(self, request: RoutedRequest) -> None:
        """The prompt no longer waits on its prefill worker. Idempotent."""
        if request.prefill is not None and not request.is_prefilled:
            request.is_prefilled = True
            load = self.loads[request.prefill]
            load.num_prefill_tokens -= request.attempt_tokens
            load.num_prompts -= 1

    def unload(self, request: RoutedRequest) -> None:
        """The attempt is over. Idempotent."""
        self.unload_prefill(request)
        for worker_id in {request.prefill, request.decode} - {None}:
            self.loads[worker_id].breaker.on_withdrawn(request.request_id)  # type: ignore[index]
        if request.decode is not None:
            load = self.loads[request.decode]
            load.num_requests -= 1
            load.num_used_blocks -= request.num_blocks_held
        request.prefill = request.decode = None
        request.num_blocks_held = 0

    def succeeded(self, request: RoutedRequest) -> None:
        """The attempt got through both workers."""
        request.avoid = None
        for worker_id in (request.prefill, request.decode):
            if worker_id is not None:
                self.loads[worker_id].breaker.on_success()

    def failed(self, request: RoutedRequest, now_s: float) -> None:
        """The attempt failed in one of the two; the next avoids one of them, so that it tells which."""
        request.avoid = request.decode if request.num_failures % 2 else request.prefill
        for worker_id in dict.fromkeys((request.prefill, request.decode)):
            if worker_id is not None:
                self.loads[worker_id].breaker.on_failure(request.request_id, now_s)

    def add_step(self, step: StepReport) -> None:
        """A worker reported an engine step."""
        self.workers[step.worker_id].add(step)
        load, seconds = self.loads[step.worker_id], step.end_s - step.start_s
        if step.phase == "prefill":
            load.add_prefill(sum(step.num_tokens.values()), seconds)
        elif step.phase == "decode" and step.num_tokens:
            load.decode_speed.add(len(step.num_tokens), seconds)

    def forget(self) -> None:
        """Count what workers do from nothing; their measured speeds stay."""
        for worker_id, totals in self.workers.items():
            fresh = WorkerTotals(totals.hello, heartbeat=totals.heartbeat, is_alive=totals.is_alive)
            self.workers[worker_id] = fresh

    def _names(self, request: RoutedRequest) -> Sequence[bytes]:
        """Names of the request's full blocks, computed again only when it has more tokens."""
        if request.num_named != len(request.token_ids):
            prefixes = Prefixes(self._layout.fingerprint(), self._settings.attention)
            named = (request.params, request.token_ids, request.num_prompt_tokens)
            request.block_names, request.num_named = prefixes.names(*named), len(request.token_ids)
        return request.block_names

    def _stays_local(self, decode: Load, num_tokens: int, num_cached: int) -> bool:
        return num_tokens == 0 or 0 < num_tokens - num_cached <= self.local_prefill_tokens

    def _too_small(
        self, loads: list[Load], num_prompt_tokens: int, max_total_tokens: int
    ) -> PoolTooSmall | None:
        """The error of a request that none of these could hold, if that is so; None where there are none."""
        needed = num_blocks(max_total_tokens)
        largest = max(loads, key=lambda load: load.num_blocks, default=None)
        if largest is None or largest.num_blocks >= needed:
            return None
        return PoolTooSmall(
            f"the request may need {needed} KV blocks ({num_prompt_tokens} prompt tokens, "
            f"{max_total_tokens - num_prompt_tokens} to generate), "
            f"{needed * self._layout.block_bytes} bytes; "
            f"the pool of {largest.worker_id} has {largest.num_blocks}"
        )


def _usable(loads: list[Load], request: RoutedRequest, now_s: float) -> list[Load]:
    """Those that are not draining; of these, where that leaves any, those that seem sound to this request."""
    settled = [load for load in loads if not load.is_draining]
    sound = [load for load in settled if load.breaker.allows(now_s)] or settled
    return [load for load in sound if load.worker_id != request.avoid] or sound
