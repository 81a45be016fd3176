"""Turns what the router sees into the catalogue's metrics, where it happens; on the router's thread only."""

import math
from collections import deque
from collections.abc import Callable

from kvrelay.config import EngineConfig
from kvrelay.energy import EnergyReport
from kvrelay.errors import KVRelayError, LeaseExpired, TransportError
from kvrelay.metrics import MetricRegistry, Timings, ratio
from kvrelay.router.core import Router
from kvrelay.router.policies import Auto
from kvrelay.router.request import RoutedRequest, Update
from kvrelay.sparse import AttentionUse
from kvrelay.types import PHASES, WorkerId
from kvrelay.wire import Heartbeat

RECENT_S = 30.0  # what is older is forgotten before the planner's pause is over
FEW_REQUESTS = 20  # fewer are not taken for all
JOULES_PER_KWH = 3.6e6
LATENCIES = {
    "request_queue_time_seconds": "queue_s",
    "request_prefill_time_seconds": "prefill_s",
    "request_transfer_wait_seconds": "transfer_wait_s",
    "request_decode_queue_seconds": "decode_queue_s",
    "request_first_decode_seconds": "first_decode_s",
    "request_decode_time_seconds": "decode_s",
    "e2e_request_latency_seconds": "e2e_s",
}
COUNTERS = {  # what workers count in heartbeats -> metric
    "prefix_cache_queries": "prefix_cache_queries_total",
    "prefix_cache_hits": "prefix_cache_hits_total",
    "kv_stalls": "kv_transfer_stalls_total",
}
TIER_HITS = "tier_hits_"  # + the tier's name


class Telemetry:
    """The router's `Observer`; `render` adds what is read rather than observed."""

    def __init__(self, config: EngineConfig, router: Router) -> None:
        self._config, self._router = config, router
        self.registry = MetricRegistry(config.served_name(), config.metrics_alias)
        self._has_slo = config.slo_ttft_s is not None or config.slo_itl_s is not None
        self.on_span: Callable[[RoutedRequest, Update], None] | None = None
        self._recent: deque[tuple[float, bool, bool]] = deque()
        self.num_met = self.num_missed = 0
        self._attention: dict[str, AttentionUse] = {}
        self._seen: dict[tuple[WorkerId, str], int] = {}
        self._seen_j: dict[tuple[WorkerId, str], float] = {}
        for reason in ("stop", "length", "abort"):
            self.registry.add("request_success_total", 0, reason)

    def on_reserved(self, request: RoutedRequest, waited_s: float) -> None:
        self.registry.observe("kv_transfer_reserve_wait_seconds", max(0.0, waited_s))

    def on_token(self, request: RoutedRequest) -> None:
        times = request.ledger.token_times_s
        if len(times) == 1:
            self.registry.observe("time_to_first_token_seconds", times[0] - request.ledger.arrived_s)
        else:
            self.registry.observe("inter_token_latency_seconds", times[-1] - times[-2])

    def on_attempt_failed(self, error: KVRelayError) -> None:
        if isinstance(error, LeaseExpired):
            self.registry.add("kv_transfer_expired_total", 1)
        if isinstance(error, TransportError):
            self.registry.add("kv_transfer_failed_total", 1, type(error).__name__)

    def on_end(self, request: RoutedRequest, update: Update) -> None:
        if self.on_span is not None:
            self.on_span(request, update)
        for phase, use in request.attention.items():
            self._attention[phase] = self._attention.get(phase, AttentionUse()) + use
            self.registry.set("sparse_attention_density", self._attention[phase].share_of_pairs, phase)
        if update.finish_reason is None:
            self.registry.add("request_failure_total", 1, type(update.error).__name__)
            return
        self.registry.add("request_success_total", 1, update.finish_reason)
        timings = request.ledger.timings(update.at_s)
        self._observe(timings, request)
        if self._has_slo and update.finish_reason != "abort":
            within = self._within(timings)
            self._recent.append((update.at_s, *within))
            met = all(within)
            self.num_met += met
            self.num_missed += not met
            self.registry.add("slo_requests_total", 1, "met" if met else "missed")

    def on_handshake(self, seconds: float) -> None:
        """A pair of workers connected."""
        self.registry.observe("kv_transfer_handshake_seconds", seconds)

    def on_role_change(self, outcome: str) -> None:
        """A change of role ended: `done` or `rolled_back`."""
        self.registry.add("role_changes_total", 1, outcome)

    def missed(self, now_s: float) -> tuple[float, float]:
        """Shares of requests that ended lately and missed the TTFT SLO, the gap SLO; 0 without an SLO."""
        while self._recent and self._recent[0][0] < now_s - RECENT_S:
            self._recent.popleft()
        count = max(FEW_REQUESTS, len(self._recent))
        in_time, smooth = (sum(met[i] for met in self._recent) for i in (1, 2))
        return (len(self._recent) - in_time) / count, (len(self._recent) - smooth) / count

    def slo(self) -> tuple[int, int]:
        """Requests that met the SLO, and those that did not: late, failed or refused."""
        failed = self._router.counts.num_ended["failed"] + self._router.queue.num_refused
        return self.num_met, self.num_missed + failed

    def render(self, energy: EnergyReport, now_s: float) -> bytes:
        """The text exposition of everything, with the meter's latest report."""
        self._collect_requests()
        self._collect_workers(now_s)
        window_s = self._router.counts.window_s(now_s, is_running=bool(self._router.requests))
        self._collect_energy(energy, window_s)
        self._collect_slo(energy, window_s)
        return self.registry.render()

    def _observe(self, timings: Timings, request: RoutedRequest) -> None:
        observe = self.registry.observe
        for name, field in LATENCIES.items():
            observe(name, max(0.0, getattr(timings, field)))
        observe("request_inference_time_seconds", max(0.0, timings.e2e_s - timings.queue_s))
        observe("request_prompt_tokens", request.num_prompt_tokens)
        num_tokens = len(request.token_ids) - request.num_prompt_tokens
        for name in ("request_generation_tokens", "request_max_num_generation_tokens"):
            observe(name, num_tokens)
        observe("request_params_max_tokens", request.params.max_tokens)
        if timings.itl_s:
            observe("request_time_per_output_token_seconds", sum(timings.itl_s) / len(timings.itl_s))

    def _within(self, timings: Timings) -> tuple[bool, bool]:
        """Whether the time to first token, and the mean gap, are within the SLO."""
        config, gaps = self._config, timings.itl_s
        mean_itl_s = sum(gaps) / len(gaps) if gaps else 0.0
        in_time = timings.ttft_s is not None and timings.ttft_s <= (config.slo_ttft_s or math.inf)
        return in_time, config.slo_itl_s is None or mean_itl_s <= config.slo_itl_s

    def _collect_requests(self) -> None:
        router, registry = self._router, self.registry
        ended = router.counts.num_ended
        registry.set("num_requests_running", len(router.requests) - len(router.queue))
        registry.set("num_requests_waiting", len(router.queue))
        registry.set_total("requests_refused_total", router.queue.num_refused)
        registry.set_total("request_retries_total", ended["retried"])
        registry.set_total("num_preemptions_total", ended["preempted"])
        registry.set_total("prompt_tokens_total", router.counts.num_prompt_tokens)
        registry.set_total("generation_tokens_total", router.counts.num_output_tokens)
        taken = router.policy.taken if isinstance(router.policy, Auto) else None
        for policy, count in (taken or {self._config.policy: router.queue.num_dispatched}).items():
            registry.set_total("policy_decisions_total", count, policy)

    def _collect_workers(self, now_s: float) -> None:
        registry = self.registry
        num_taken = num_blocks = 0
        for worker_id, totals in self._router.workers.items():
            load, beat = self._router.fleet.loads[worker_id], totals.heartbeat
            labels = (worker_id, load.role)
            registry.set("worker_up", float(totals.is_alive), *labels, totals.hello.device)
            is_open = load.breaker.state(now_s) != "closed"
            registry.set("worker_breaker_open", float(is_open), *labels)
            registry.set("worker_requests", load.num_requests, *labels)
            registry.set("worker_prefill_tokens_waiting", load.num_prefill_tokens, *labels)
            for phase in PHASES:
                registry.set_total("worker_busy_seconds_total", totals.busy_s[phase], *labels, phase)
                registry.set_total("worker_tokens_total", totals.num_tokens[phase], *labels, phase)
            if totals.num_steps["transfer"]:
                registry.set_total("kv_transfer_copy_seconds_total", totals.busy_s["transfer"], worker_id)
                registry.set_total("kv_transfer_bytes_total", totals.kv_bytes, worker_id)
            if beat is None:
                continue
            self._collect_counters(beat)
            taken = beat.num_blocks - beat.num_free_blocks
            registry.set("worker_kv_cache_usage_ratio", taken / beat.num_blocks, *labels)
            if load.role != "prefill":
                num_taken, num_blocks = num_taken + taken, num_blocks + beat.num_blocks
        registry.set("kv_cache_usage_perc", ratio(num_taken, num_blocks))

    def _collect_counters(self, beat: Heartbeat) -> None:
        """What only some engines count: absent from `/metrics` where workers do not report it."""
        for counter, count in beat.counters.items():
            seen = self._seen.get((beat.worker_id, counter), 0)
            self._seen[beat.worker_id, counter] = max(seen, count)
            if counter in COUNTERS:
                self.registry.add(COUNTERS[counter], max(0, count - seen))
            elif counter.startswith(TIER_HITS):
                self.registry.add("kv_tier_hits_total", max(0, count - seen), counter.removeprefix(TIER_HITS))

    def _collect_energy(self, energy: EnergyReport, window_s: float) -> None:
        registry, source, counts = self.registry, energy.source, self._router.counts
        registry.set("cost_per_million_tokens", self._cost(window_s, counts.num_output_tokens), "output")
        num_tokens = counts.num_output_tokens + counts.num_prompt_tokens
        registry.set("cost_per_million_tokens", self._cost(window_s, num_tokens), "total")
        if source is None or energy.gross_j is None:
            return
        self._collect_joules(energy, source)
        for phase in PHASES:
            done = sum(worker.num_tokens[phase] for worker in self._router.workers.values())
            registry.set("tokens_per_joule", ratio(done, energy.phase_j(phase)), phase, source)
        gross_j, finished = energy.gross_j, counts.num_ended["finished"]
        registry.set("average_power_watts", ratio(gross_j, energy.window_s), source)
        registry.set("output_tokens_per_joule", ratio(counts.num_output_tokens, gross_j), source)
        registry.set("energy_per_output_token_joules", ratio(gross_j, counts.num_output_tokens), source)
        registry.set("energy_per_total_token_joules", ratio(gross_j, num_tokens), source)
        registry.set("energy_per_request_joules", ratio(gross_j, finished), source)

    def _collect_joules(self, energy: EnergyReport, source: str) -> None:
        registry, config = self.registry, self._config
        for name in ("gross", "idle", "net"):
            registry.set_total(f"energy_{name}_joules_total", getattr(energy, f"{name}_j"), source)
        own_idle_j = 0.0
        for worker_id, worker in energy.workers.items():
            own_idle_j += worker.idle_j or 0.0
            for phase in (*PHASES, "idle"):
                self._add_joules(WorkerId(worker_id), phase, getattr(worker, f"{phase}_j"), source)
        shared_j = (energy.idle_j or 0.0) - own_idle_j
        if shared_j > 1e-6:
            registry.set_total("energy_joules_total", shared_j, "shared", "idle", source)
        if config.pue is not None and energy.gross_j is not None:
            registry.set_total("energy_facility_joules_total", energy.gross_j * config.pue, source)
        if config.carbon_g_per_kwh is not None and energy.gross_j is not None:
            kwh = energy.gross_j * (config.pue or 1.0) / JOULES_PER_KWH
            registry.set_total("carbon_grams_total", kwh * config.carbon_g_per_kwh, source)

    def _add_joules(self, worker_id: WorkerId, phase: str, joules: float | None, source: str) -> None:
        """Charge what is new since the last look to the role that the worker has now."""
        if joules is None:
            return
        seen_j = self._seen_j.get((worker_id, phase), 0.0)
        self._seen_j[worker_id, phase] = max(joules, seen_j)
        role = self._router.fleet.loads[worker_id].role
        self.registry.add("energy_joules_total", max(0.0, joules - seen_j), role, phase, source)

    def _collect_slo(self, energy: EnergyReport, window_s: float) -> None:
        if not self._has_slo:
            return
        registry = self.registry
        registry.set("slo_attainment_ratio", ratio(self.num_met, sum(self.slo())))
        registry.set("goodput_requests_per_second", ratio(self.num_met, window_s))
        if energy.source is not None:
            registry.set("goodput_requests_per_joule", ratio(self.num_met, energy.gross_j), energy.source)

    def _cost(self, window_s: float, num_tokens: int) -> float | None:
        price = self._config.price_per_hour
        return None if price is None else ratio(price * window_s / 3600.0 * 1e6, num_tokens)
