"""Where disaggregation loses: 1P1D over colocated on the same cores, by prompt length and load.

    python benchmarks/disaggregation_map.py [--rounds 3] [--lengths 128 512 2048] [--loads 0.3 0.8] [--add]

Requests of one length arrive at random (exponential gaps, the same in every configuration), at `load` times
the rate that colocated serves them at one after the other, and ask for `--output-tokens`. For each cell:
1P1D over colocated in time to first token, in end-to-end time and in inter-token latency p99. Above 1,
disaggregation lost.

Configurations alternate, each in an engine of its own; medians over rounds; the gate: every request was
answered with exactly its tokens, the same (float32, greedy) in every round and configuration. There is no
prefix cache: each cell's prompts begin alike, and would find one another. `--add` adds
rounds to the record of earlier calls at the same commit. The last line is the JSON record, also under
benchmarks/results/.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvrelay import LLM, SamplingParams
from kvrelay.experiments.record import Gate, make_record, write_record
from load import Watch, earlier_rounds, itl, random_prompt

MODES = ("colocated", "disaggregated")
FIGURES = ("ttft_ms", "e2e_ms", "itl_p99_ms")


def main() -> None:
    """Run, print, record."""
    options = _options()
    path = options.out / "disaggregation_map.json"
    rows: list[dict[str, Any]] = earlier_rounds(path) if options.add else []
    first = 1 + max((row["round"] for row in rows), default=-1)
    for index in range(first, first + options.rounds):
        alone_s: dict[str, float] = rows[0]["alone_s"] if rows else {}
        for mode in MODES[:: -1 if rows and index % 2 else 1]:
            with LLM(options.model, dtype=options.dtype, mode=mode, prefix_cache=False) as llm:
                alone_s = alone_s or _alone_s(llm, options)
                for length in options.lengths:
                    for load in options.loads:
                        row = _cell(llm, options, length, load / alone_s[str(length)])
                        key = {"mode": mode, "round": index, "length": length, "load": load}
                        rows.append({**key, "alone_s": alone_s, **row})
                        print({k: v for k, v in rows[-1].items() if k != "tokens"}, flush=True)
    results = summary(rows)
    gate = _gate(rows, options.output_tokens)
    for row in results:
        print("  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    print(f"gate: {gate.checks}")
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "add")}
    record = make_record("disaggregation_map", settings, gate, {"map": results, "rounds": rows})
    write_record(record, path)
    print(json.dumps(record))


def _alone_s(llm: LLM, options: argparse.Namespace) -> dict[str, float]:
    """Seconds that one request of each length takes alone, colocated: what a load of 1 means."""
    found = {}
    for length in options.lengths:
        seconds = []
        for seed in (-1, -2):  # the first warms up
            watch = Watch(llm, random_prompt(llm, length, seed), _params(options))
            watch.wait_end()
            seconds.append(watch.token_s[-1] - watch.start_s)
        found[str(length)] = seconds[-1]
    return found


def _cell(llm: LLM, options: argparse.Namespace, length: int, per_s: float) -> dict[str, Any]:
    """Open loop: requests arrive whether or not earlier ones are done."""
    source = random.Random(length)
    watches = []
    for index in range(options.requests):
        watches.append(Watch(llm, random_prompt(llm, length, index), _params(options)))
        if index + 1 < options.requests:
            time.sleep(source.expovariate(per_s))
    for watch in watches:
        watch.wait_end()
    until_s = max(watch.token_s[-1] for watch in watches)
    return {
        "ttft_ms": 1e3 * statistics.mean(w.token_s[0] - w.start_s for w in watches),
        "e2e_ms": 1e3 * statistics.mean(w.token_s[-1] - w.start_s for w in watches),
        "itl_p99_ms": itl(watches, watches[0].start_s, until_s)["itl_p99_ms"],
        "tokens": [watch.token_ids for watch in watches],
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """One row per cell: medians of colocated, and 1P1D over them."""
    found = []
    for length, load in dict.fromkeys((row["length"], row["load"]) for row in rows):
        cell = [row for row in rows if (row["length"], row["load"]) == (length, load)]
        medians = {
            mode: {key: statistics.median(r[key] for r in cell if r["mode"] == mode) for key in FIGURES}
            for mode in MODES
        }
        line = {"length": length, "load": load}
        for key in FIGURES:
            line[f"colocated_{key}"] = medians["colocated"][key]
            line[f"{key.removesuffix('_ms')}_ratio"] = (
                medians["disaggregated"][key] / medians["colocated"][key]
            )
        found.append(line)
    return found


def _gate(rows: Sequence[dict[str, Any]], output_tokens: int) -> Gate:
    answers: dict[int, set[str]] = {}
    for row in rows:
        answers.setdefault(row["length"], set()).add(json.dumps(row["tokens"]))
    return Gate(
        checks={
            "every request was answered with exactly its tokens": all(
                len(tokens) == output_tokens for row in rows for tokens in row["tokens"]
            ),
            "the same tokens in every round and configuration": all(len(a) == 1 for a in answers.values()),
        }
    )


def _params(options: argparse.Namespace) -> SamplingParams:
    return SamplingParams(max_tokens=options.output_tokens, temperature=0.0, ignore_eos=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.8])
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--add", action="store_true", help="to the record of earlier calls")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
