"""Policies on a pool of unequal workers: joules per token and SLO attainment, in simulation.

    python benchmarks/routing.py [--seconds 120] [--seeds 3]

The real router over simulated workers under a virtual clock: one prefill and one decode worker of a newer,
thriftier kind beside one each of an older, hungrier kind (linear time and power models, below; not a
measurement of hardware). The same traces for every policy, at shares of what the whole pool can sustain.
The gate: at every load `energy_aware` spends fewer joules per token than `round_robin`, and attains the SLO
as often. The last line is the JSON record, also written to benchmarks/results/.
"""

import argparse
import json
import random
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.experiments.simulated_worker import WorkerModel
from kvrelay.experiments.simulation import Arrival, Simulation
from kvrelay.router.policies import POLICIES

NEW: dict[str, Any] = {"prefill_tokens_per_s": 20_000.0, "step_s": 0.012, "step_s_per_sequence": 0.0003}
OLD: dict[str, Any] = {"prefill_tokens_per_s": 8_000.0, "step_s": 0.020, "step_s_per_sequence": 0.0006}
POOL = [
    WorkerModel(worker_id="prefill-new", role="prefill", idle_w=60, busy_w=350, **NEW),
    WorkerModel(worker_id="prefill-old", role="prefill", idle_w=50, busy_w=300, **OLD),
    WorkerModel(worker_id="decode-new", role="decode", idle_w=60, busy_w=280, **NEW),
    WorkerModel(worker_id="decode-old", role="decode", idle_w=50, busy_w=250, **OLD),
]
SLO = {"slo_ttft_s": 1.0, "slo_itl_s": 0.05}
LOADS = (0.1, 0.3, 0.5, 0.7)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, print, record; the record."""
    options = _options(arguments)
    rate_per_s = sustainable_rate()
    rows = {
        load: {policy: _figures(policy, load * rate_per_s, options) for policy in sorted(POLICIES)}
        for load in LOADS
    }
    for load, by_policy in rows.items():
        for policy, row in by_policy.items():
            figures = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
            print(f"load {load:.0%} {policy:13} {figures}")
    checks = {}
    for load, by_policy in rows.items():
        ours, theirs = by_policy["energy_aware"], by_policy["round_robin"]
        checks[f"fewer joules per token at {load:.0%}"] = (
            ours["joules_per_token"] < theirs["joules_per_token"]
        )
        checks[f"SLO attained as often at {load:.0%}"] = ours["slo_attained"] >= theirs["slo_attained"]
    gate = Gate(checks=checks)
    print(f"gate: {gate.checks}")
    settings = {**vars(options), "pool": [asdict(model) for model in POOL], "rate_per_s": rate_per_s}
    settings |= {**SLO, "out": None}
    record = make_record("routing", settings, gate, {"by_load": {f"{k:.0%}": row for k, row in rows.items()}})
    if options.out is not None:
        write_record(record, options.out / "routing.json")
    print(json.dumps(record))
    return record


def sustainable_rate() -> float:
    """Requests per second that the whole pool finishes when there is always one more."""
    chance = random.Random(0)
    trace = [_arrival(0.0, chance) for _ in range(600)]
    return len(trace) / Simulation(POOL).run(trace).now_s


def _figures(policy: str, rate_per_s: float, options: argparse.Namespace) -> dict[str, float]:
    """Medians over the seeds."""
    rows = [_run(policy, rate_per_s, options.seconds, seed) for seed in range(options.seeds)]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _run(policy: str, rate_per_s: float, seconds: float, seed: int) -> dict[str, float]:
    run = Simulation(POOL, policy=policy, max_queued_requests=256, **SLO).run(
        _trace(rate_per_s, seconds, seed)
    )
    served = [outcome for outcome in run.outcomes if outcome.error is None and outcome.timings is not None]
    ttfts = sorted(o.timings.ttft_s or 0.0 for o in served if o.timings is not None)
    met = [
        o
        for o in served
        if o.timings is not None
        and (o.timings.ttft_s or 0.0) <= SLO["slo_ttft_s"]
        and o.mean_itl_s <= SLO["slo_itl_s"]
    ]
    idle_j = sum(worker.model.idle_w for worker in run.workers.values()) * run.now_s
    return {
        "joules_per_token": run.joules / run.num_output_tokens,
        "net_joules_per_token": (run.joules - idle_j) / run.num_output_tokens,
        "slo_attained": len(met) / len(run.outcomes),
        "ttft_p99_s": ttfts[min(len(ttfts) - 1, int(0.99 * len(ttfts)))],
        "mean_itl_ms": 1e3 * statistics.mean(outcome.mean_itl_s for outcome in served),
        "requests": float(len(run.outcomes)),
    }


def _trace(rate_per_s: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals."""
    chance, at_s, trace = random.Random(seed), 0.0, []
    while (at_s := at_s + chance.expovariate(rate_per_s)) < seconds:
        trace.append(_arrival(at_s, chance))
    return trace


def _arrival(at_s: float, chance: random.Random) -> Arrival:
    return Arrival(at_s, chance.randint(200, 3000), chance.randint(50, 250))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
