"""Every metric there is: name, kind, labels, unit, meaning, and the names others give to the same figure.

Declared once; `/metrics`, docs/metrics.md and the Grafana dashboard are made from this list, and a test fails
when any of them knows a name that another does not. Knows no values and no Prometheus.
"""

from dataclasses import dataclass
from typing import Literal

PREFIX = "kvrelay:"
VLLM_PREFIX = "vllm:"

Kind = Literal["counter", "gauge", "histogram"]

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4),
    *(0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; `name` is without prefix and, for counters, with `_total`.

    `vllm` says that vLLM exports the same figure under the same name, so that it may be shown under vLLM's
    prefix too. `also` is what another project calls it. `needs` says what it takes for it to appear.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    vllm: bool = False
    also: str = ""
    needs: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """Metrics that belong together, on one row of the dashboard."""

    title: str
    metrics: tuple[Metric, ...]


def _seconds(name: str, text: str, *, vllm: bool = False) -> Metric:
    return Metric(name, "histogram", "seconds", text, buckets=SECONDS, vllm=vllm)


WORKER = ("worker_id", "role")

# fmt: off
REQUESTS = Section(
    "Requests",
    (
        Metric("num_requests_running", "gauge", "requests",
            "Requests given to workers and not ended.", vllm=True),
        Metric("num_requests_waiting", "gauge", "requests",
            "Requests in the router's queue: no pair of workers can take them yet.", vllm=True),
        Metric("request_success_total", "counter", "requests",
            "Requests that ended as asked: stop, length or abort.", labels=("finished_reason",), vllm=True),
        Metric("request_failure_total", "counter", "requests",
            "Requests that ended with an error, by its class; DeadlineExceeded never began.",
            labels=("error",)),
        Metric("requests_refused_total", "counter", "requests",
            "Requests refused because the queue was full (HTTP 429)."),
        Metric("request_retries_total", "counter", "attempts",
            "Attempts that failed and were made again elsewhere."),
        Metric("num_preemptions_total", "counter", "attempts",
            "Attempts that gave their KV blocks to older requests.", vllm=True),
        Metric("policy_decisions_total", "counter", "attempts",
            "Pairs chosen, by the policy that chose; for `auto` by the one it took.", labels=("policy",)),
    ),
)
LATENCY = Section(
    "Latency",
    (
        _seconds("time_to_first_token_seconds", "Arrival to first token.", vllm=True),
        _seconds("inter_token_latency_seconds", "Gaps between delivered tokens.", vllm=True),
        _seconds("request_time_per_output_token_seconds",
            "Mean gap between a request's tokens, one value per request.", vllm=True),
        _seconds("e2e_request_latency_seconds", "Arrival to end.", vllm=True),
        _seconds("request_queue_time_seconds",
            "Waiting for a pair, for decode blocks and for prefill to start.", vllm=True),
        _seconds("request_prefill_time_seconds", "First prefill chunk to last.", vllm=True),
        _seconds("request_decode_time_seconds", "First token to end.", vllm=True),
        _seconds("request_inference_time_seconds", "Prefill start to end: all but the queue.", vllm=True),
        _seconds("request_transfer_wait_seconds", "KV still on its way after prefill was done."),
        _seconds("request_decode_queue_seconds", "KV there, first decode step not yet started."),
        _seconds("request_first_decode_seconds", "The first decode step."),
    ),
)
TOKENS = Section(
    "Tokens",
    (
        Metric("prompt_tokens_total", "counter", "tokens", "Prompt tokens of requests taken.", vllm=True),
        Metric("generation_tokens_total", "counter", "tokens", "Tokens delivered.", vllm=True),
        Metric("request_prompt_tokens", "histogram", "tokens",
            "Prompt tokens of a request.", buckets=COUNTS, vllm=True),
        Metric("request_generation_tokens", "histogram", "tokens",
            "Tokens delivered of a request.", buckets=COUNTS, vllm=True),
        Metric("request_max_num_generation_tokens", "histogram", "tokens",
            "Tokens delivered of a request's longest choice; each choice is a request of its own here.",
            buckets=COUNTS, vllm=True),
        Metric("request_params_max_tokens", "histogram", "tokens",
            "Tokens that a request asked for at most.", buckets=COUNTS, vllm=True),
    ),
)
KV = Section(
    "KV cache and transfer",
    (
        Metric("kv_cache_usage_perc", "gauge", "ratio",
            "Taken share of all decode workers' KV blocks, 0 to 1.", vllm=True),
        Metric("worker_kv_cache_usage_ratio", "gauge", "ratio",
            "Taken share of a worker's KV blocks, 0 to 1.", labels=WORKER),
        _seconds("kv_transfer_handshake_seconds", "Connecting one pair of workers."),
        _seconds("kv_transfer_reserve_wait_seconds", "Decode asked for blocks to blocks reserved."),
        Metric("kv_transfer_copy_seconds_total", "counter", "seconds",
            "Time spent copying KV, by the worker that wrote.", labels=("worker_id",)),
        Metric("kv_transfer_bytes_total", "counter", "bytes",
            "KV bytes written into other workers' memory, by the worker that wrote.", labels=("worker_id",)),
        Metric("kv_transfer_failed_total", "counter", "attempts",
            "Attempts whose KV did not arrive whole, by error class.", labels=("error",)),
        Metric("kv_transfer_expired_total", "counter", "attempts",
            "Attempts whose writer was silent for a whole lease."),
        Metric("kv_transfer_stalls_total", "counter", "steps",
            "Decode steps repeated because KV that they read had not come yet.", needs="a sparse hand-off"),
        Metric("prefix_cache_queries_total", "counter", "tokens",
            "Prompt tokens looked up in prefix caches.", vllm=True, needs="prefix caching"),
        Metric("prefix_cache_hits_total", "counter", "tokens",
            "Prompt tokens found in prefix caches.", vllm=True, needs="prefix caching"),
        Metric("kv_tier_hits_total", "counter", "blocks",
            "KV blocks brought back from a lower tier.", labels=("tier",), needs="a KV tier"),
        Metric("sparse_attention_density", "gauge", "ratio",
            "Share of dense attention's (query, key) pairs that ended requests read, 0 to 1.",
            labels=("phase",), needs="sparse attention"),
    ),
)
ENERGY = Section(
    "Energy",
    (
        Metric("energy_joules_total", "counter", "joules",
            "Joules by role and phase (idle is one).", labels=("role", "phase", "source"), needs="a meter"),
        Metric("energy_gross_joules_total", "counter", "joules",
            "All joules, idle included.", labels=("source",), also="AIPerf total_gpu_energy",
            needs="a meter"),
        Metric("energy_idle_joules_total", "counter", "joules",
            "Joules while nobody was at work.", labels=("source",), needs="a meter"),
        Metric("energy_net_joules_total", "counter", "joules",
            "Gross minus idle.", labels=("source",), needs="a meter"),
        Metric("average_power_watts", "gauge", "watts",
            "Gross joules over the metered time.", labels=("source",), also="AIPerf average_gpu_power",
            needs="a meter"),
        Metric("tokens_per_joule", "gauge", "tokens/J",
            "Tokens of a phase per joule of that phase.", labels=("phase", "source"), needs="a meter"),
        Metric("output_tokens_per_joule", "gauge", "tokens/J",
            "Delivered tokens per gross joule.", labels=("source",), also="AIPerf output_tokens_per_joule",
            needs="a meter"),
        Metric("energy_per_output_token_joules", "gauge", "J/token",
            "Gross joules per delivered token.", labels=("source",),
            also="AIPerf energy_per_output_token; ML.ENERGY energy per token", needs="a meter"),
        Metric("energy_per_total_token_joules", "gauge", "J/token",
            "Gross joules per prompt or delivered token.", labels=("source",),
            also="AIPerf energy_per_total_token", needs="a meter"),
        Metric("energy_per_request_joules", "gauge", "J",
            "Gross joules per finished request.", labels=("source",),
            also="AIPerf energy_per_request; ML.ENERGY energy per response", needs="a meter"),
        Metric("energy_facility_joules_total", "counter", "joules",
            "Gross joules times `pue`.", labels=("source",), needs="a meter and `pue`"),
        Metric("carbon_grams_total", "counter", "grams",
            "Grams of CO2: kilowatt-hours (times `pue`, where set) times `carbon_g_per_kwh`.",
            labels=("source",), needs="a meter and `carbon_g_per_kwh`"),
        Metric("cost_per_million_tokens", "gauge", "currency",
            "`price_per_hour` over the window, per million tokens.", labels=("tokens",),
            needs="`price_per_hour`"),
    ),
)
SLO = Section(
    "Service levels",
    (
        Metric("slo_requests_total", "counter", "requests",
            "Finished requests that met, or missed, `slo_ttft_s` and (by mean gap) `slo_itl_s`.",
            labels=("outcome",), needs="`slo_ttft_s` or `slo_itl_s`"),
        Metric("slo_attainment_ratio", "gauge", "ratio",
            "Met over met, missed, failed and refused, 0 to 1.", needs="`slo_ttft_s` or `slo_itl_s`"),
        Metric("goodput_requests_per_second", "gauge", "requests/s",
            "Requests that met the SLO, over the window.", also="AIPerf goodput",
            needs="`slo_ttft_s` or `slo_itl_s`"),
        Metric("goodput_requests_per_joule", "gauge", "requests/J",
            "Requests that met the SLO, per gross joule.", labels=("source",),
            also="AIPerf goodput_per_watt", needs="an SLO and a meter"),
    ),
)
WORKERS = Section(
    "Workers",
    (
        Metric("worker_up", "gauge", "bool",
            "1 while the worker's process lives.", labels=(*WORKER, "device")),
        Metric("worker_breaker_open", "gauge", "bool",
            "1 while the worker is left alone because its attempts failed in a row.", labels=WORKER),
        Metric("worker_requests", "gauge", "requests",
            "Requests that the worker decodes, or will.", labels=WORKER),
        Metric("worker_prefill_tokens_waiting", "gauge", "tokens",
            "Prompt tokens given to the worker whose prefill has not ended.", labels=WORKER),
        Metric("worker_busy_seconds_total", "counter", "seconds",
            "Seconds at work, by phase.", labels=(*WORKER, "phase")),
        Metric("worker_tokens_total", "counter", "tokens",
            "Tokens worked on, by phase.", labels=(*WORKER, "phase")),
        Metric("role_changes_total", "counter", "changes",
            "Changes of a worker's role at run time: done or rolled_back.", labels=("outcome",)),
    ),
)
# fmt: on

CATALOGUE = (REQUESTS, LATENCY, TOKENS, KV, ENERGY, SLO, WORKERS)
METRICS = {metric.name: metric for section in CATALOGUE for metric in section.metrics}
