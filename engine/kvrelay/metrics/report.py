"""What is measured: the latency ledger of a request, the counters of a run, and the report they become.

A request's life is a list of timestamped events; every latency is derived from it, so the parts add up by
construction. Knows no clock, no tensors, no sockets.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from kvrelay.types import PHASES, Phase, Role, WorkerId
from kvrelay.wire import Heartbeat, Hello, StepReport

SPANS = {  # event -> the part of the ledger that it begins
    "arrived": "queue_s",
    "requeued": "queue_s",
    "prefill_started": "prefill_s",
    "prefill_finished": "transfer_wait_s",
    "kv_usable": "decode_queue_s",  # of a hand-off in parts: decode starts before all has come
    "kv_committed": "decode_queue_s",
    "decode_started": "first_decode_s",
    "first_token": "decode_s",
}


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """One request's ledger, in seconds. The first six parts sum to `e2e_s`.

    Up to the first token they sum to `ttft_s`: queue (waiting for a prefill slot, reservation included),
    prefill, transfer wait (KV still on its way after the last token was computed), decode queue, first decode
    step. `decode_s` is everything after the first token, but for a retry: its queue and prefill go under
    their own names. `itl_s` holds the gaps between tokens as they were delivered, one fewer than tokens.

    `transfer_s` is no part of the sum: seconds in which KV was copied, most of them while prefill went on.
    `transfer_overlap` is the share of it that `transfer_wait_s` does not show; None when nothing was copied.
    """

    queue_s: float
    prefill_s: float
    transfer_wait_s: float
    decode_queue_s: float
    first_decode_s: float
    decode_s: float
    ttft_s: float | None
    e2e_s: float
    itl_s: list[float]
    transfer_s: float = 0.0
    transfer_overlap: float | None = None


@dataclass(slots=True)
class Ledger:
    """A request's events, and the times its tokens were delivered."""

    events: list[tuple[float, str]] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    transfer_s: float = 0.0

    def add(self, event: str, at_s: float) -> None:
        """Append an event; one that is reported late takes its place in time."""
        self.events.append((at_s, event))

    def token(self, at_s: float) -> None:
        """A token was delivered."""
        if not self.token_times_s:
            self.add("first_token", at_s)
        self.token_times_s.append(at_s)

    @property
    def arrived_s(self) -> float:
        """When the request arrived."""
        return self.events[0][0]

    def part(self) -> str:
        """The part of the ledger that the request is in, `queue` to `decode`."""
        _, event = max(self.events, key=lambda event: (event[0], event[1] == "first_token"))
        return SPANS[event].removesuffix("_s")

    def timings(self, end_s: float) -> Timings:
        """The ledger of a request that ended, or is looked at, at `end_s`.

        At one and the same instant the first token comes last: what led to it cannot follow it.
        """
        events = sorted(self.events, key=lambda event: (event[0], event[1] == "first_token"))
        parts = dict.fromkeys(SPANS.values(), 0.0)
        ends = [at_s for at_s, _ in events[1:]] + [end_s]
        started = False
        for (start_s, event), stop_s in zip(events, ends, strict=True):
            started = started or event == "first_token"
            part = "decode_s" if event == "decode_started" and started else SPANS[event]
            parts[part] += stop_s - start_s
        times = self.token_times_s
        arrived_s = events[0][0]
        return Timings(
            **parts,
            ttft_s=times[0] - arrived_s if times else None,
            e2e_s=end_s - arrived_s,
            itl_s=[later - earlier for earlier, later in pairwise(times)],
            transfer_s=self.transfer_s,
            transfer_overlap=hidden_share(self.transfer_s, parts["transfer_wait_s"]),
        )


@dataclass(slots=True)
class WorkerTotals:
    """What one worker has done so far."""

    hello: Hello
    busy_s: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    num_tokens: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    num_steps: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    kv_bytes: int = 0
    heartbeat: Heartbeat | None = None
    is_alive: bool = True

    def add(self, step: StepReport) -> None:
        """Count one engine step."""
        self.busy_s[step.phase] += step.end_s - step.start_s
        self.num_tokens[step.phase] += sum(step.num_tokens.values())
        self.num_steps[step.phase] += 1
        self.kv_bytes += sum(step.moved_bytes.values())


class PhaseReport(msgspec.Struct, kw_only=True):
    """One phase over the whole run. `tokens_per_s` is per second of work in the phase, all workers together.

    `joules` is None without a meter; `tokens_per_joule` is None then, and where no joule was spent.
    """

    num_tokens: int
    num_steps: int
    busy_s: float
    tokens_per_s: float | None
    joules: float | None
    tokens_per_joule: float | None


class WorkerReport(msgspec.Struct, kw_only=True):
    """One worker over the whole run; `busy_s` and `num_tokens` by phase.

    Of the `num_free_blocks`, `num_cached_blocks` keep KV that can be found. `prefix_cache_hit_rate` is tokens
    found over tokens looked for; a request looks on its prefill worker and on its decode worker.
    """

    worker_id: WorkerId
    pid: int
    role: Role
    device: str
    dtype: str
    model_impl: str
    num_threads: int
    load_s: float
    is_alive: bool
    busy_s: dict[str, float]
    num_tokens: dict[str, int]
    joules: float | None
    num_blocks: int
    peak_blocks: int
    num_free_blocks: int | None
    num_cached_blocks: int | None
    prefix_cache_hit_rate: float | None
    kv_bytes_written: int
    counters: dict[str, int]


class Report(msgspec.Struct, kw_only=True):
    """What `LLM.report()` returns; see docs/report.md for how to read it.

    `window_s` is from the first request's arrival to the last delivery, and `output_tokens_per_s` is over
    it. Joules: `total_j` = the phases' + `idle_j`. `energy_source` says who measured, or which watts were
    assumed; None when nobody did, and `energy_note` then says why. `energy` is the meter's whole account.
    """

    window_s: float
    num_requests: dict[str, int]
    num_prompt_tokens: int
    num_output_tokens: int
    output_tokens_per_s: float | None
    phases: dict[str, PhaseReport]
    kv_bytes_moved: int
    kv_gb_per_s: float | None
    transfer_overlap: float | None
    transfer_share_of_ttft: float | None
    total_j: float | None
    idle_j: float | None
    output_tokens_per_joule: float | None
    energy_source: str | None
    energy_note: str
    energy: dict[str, Any]
    workers: list[WorkerReport]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        result: dict[str, Any] = msgspec.to_builtins(self)
        return result


def ratio(amount: float | None, per: float | None) -> float | None:
    """`amount / per`, or None when either is unknown or there is nothing to divide by."""
    return amount / per if amount is not None and per else None


def hidden_share(transfer_s: float, wait_s: float) -> float | None:
    """The share of the copying that nobody waited for, 0 to 1; None when nothing was copied."""
    return max(0.0, 1.0 - wait_s / transfer_s) if transfer_s else None


def phase_report(phase: Phase, workers: list[WorkerTotals], joules: float | None) -> PhaseReport:
    """Sum one phase over the workers."""
    busy_s = sum(worker.busy_s[phase] for worker in workers)
    num_tokens = sum(worker.num_tokens[phase] for worker in workers)
    return PhaseReport(
        num_tokens=num_tokens,
        num_steps=sum(worker.num_steps[phase] for worker in workers),
        busy_s=busy_s,
        tokens_per_s=ratio(num_tokens, busy_s),
        joules=joules,
        tokens_per_joule=ratio(num_tokens, joules),
    )


def worker_report(totals: WorkerTotals, joules: float | None, role: Role) -> WorkerReport:
    """One worker's totals as they are shown; `role` is the one it has now."""
    hello, beat = totals.hello, totals.heartbeat
    counters = dict(beat.counters) if beat else {}
    return WorkerReport(
        worker_id=hello.worker_id,
        pid=hello.pid,
        role=role,
        device=hello.device,
        dtype=hello.descriptor.layout.dtype,
        model_impl=hello.model_impl,
        num_threads=hello.num_threads,
        load_s=hello.load_s,
        is_alive=totals.is_alive,
        busy_s={phase: totals.busy_s[phase] for phase in PHASES},
        num_tokens={phase: totals.num_tokens[phase] for phase in PHASES},
        joules=joules,
        num_blocks=hello.descriptor.num_blocks,
        peak_blocks=beat.peak_blocks if beat else 0,
        num_free_blocks=beat.num_free_blocks if beat else None,
        num_cached_blocks=beat.num_cached_blocks if beat else None,
        prefix_cache_hit_rate=ratio(
            counters.get("prefix_cache_hits", 0), counters.get("prefix_cache_queries")
        ),
        kv_bytes_written=totals.kv_bytes,
        counters=counters,
    )
