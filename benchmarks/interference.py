"""What long prompts do to streams that are already running: colocated against 1P1D on the same cores.

    python benchmarks/interference.py [--rounds 3] [--streams 4] [--prompt-tokens 4096] [--prompts 2] [--add]

Keeps `--streams` requests decoding while long prompts arrive, the next one as soon as the last has its first
token, so that exactly one is always being prefilled. Reports the inter-token latency (ITL) of the running
streams in that time, their tokens/s, and the prompts' time to first token. Colocated runs with the default
chunk and with a small one: chunking is what a colocated engine has against interference, and what it costs is
the prompt's time. Configurations alternate, each in an engine of its own; medians over rounds.

The gate: every long prompt was answered with exactly its tokens, and the streams' greedy tokens are the same
in every round and configuration. `--add` adds rounds to the record of earlier calls at the same commit. The
last line is the JSON record, also under benchmarks/results/, with a plot beside it.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvrelay import LLM, SamplingParams
from kvrelay.experiments.record import Gate, make_record, write_record
from load import Watch, earlier_rounds, itl, random_prompt

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "colocated": {"mode": "colocated"},
    "colocated, chunks of 128": {"mode": "colocated", "prefill_chunk_tokens": 128},
    "1P1D": {"mode": "disaggregated"},
}
STREAM_PROMPT = 64
STREAM_TOKENS = 4096  # longer than any run: streams are ended from outside
PROMPT_OUTPUT = 4
COMPARED = 8  # tokens of each stream that every run must share, however slow it was


def main() -> None:
    """Run, print, record."""
    options = _options()
    path = options.out / "interference.json"
    rows: list[dict[str, Any]] = earlier_rounds(path) if options.add else []
    first = 1 + max((row["round"] for row in rows), default=-1)
    for index in range(first, first + options.rounds):
        for name in list(CONFIGURATIONS)[:: -1 if index % 2 else 1]:
            rows.append({"configuration": name, "round": index, **_run(options, CONFIGURATIONS[name])})
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "beginnings"}), flush=True)
    results = summary(rows)
    gate = _gate(rows)
    for name, row in results.items():
        print(f"{name:34} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(f"gate: {gate.checks}")
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "add")}
    record = make_record("interference", settings, gate, {"medians": results, "rounds": rows})
    write_record(record, path)
    _write_plot(rows, path.with_suffix(".png"))
    print(json.dumps(record))


def _run(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """One configuration: streams first, then the long prompts one after the other; figures of that time."""
    endless = SamplingParams(max_tokens=STREAM_TOKENS, temperature=0.0, ignore_eos=True)
    short = SamplingParams(max_tokens=PROMPT_OUTPUT, temperature=0.0, ignore_eos=True)
    with LLM(options.model, dtype=options.dtype, **settings) as llm:
        streams = [Watch(llm, random_prompt(llm, STREAM_PROMPT, i), endless) for i in range(options.streams)]
        for stream in streams:
            stream.wait(num_tokens=COMPARED)
        alone_from = max(stream.token_s[-1] for stream in streams)
        streams[0].wait(num_tokens=len(streams[0].token_s) + options.quiet_tokens)
        from_s = streams[0].token_s[-1]
        prompts = []
        for index in range(options.prompts):
            prompts.append(Watch(llm, random_prompt(llm, options.prompt_tokens, 1000 + index), short))
            prompts[-1].wait(num_tokens=1)
        until_s = prompts[-1].token_s[0]
        for prompt in prompts:
            prompt.wait_end()
        for stream in streams:
            stream.stop()
    return {
        **itl(streams, from_s, until_s),
        "alone_itl_p50_ms": itl(streams, alone_from, from_s)["itl_p50_ms"],
        "prompt_ttft_ms": 1e3 * statistics.median(p.token_s[0] - p.start_s for p in prompts),
        "prompts_whole": all(len(prompt.token_ids) == PROMPT_OUTPUT for prompt in prompts),
        "beginnings": [stream.token_ids[:COMPARED] for stream in streams],
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians by configuration, and how many times better 1P1D is: above 1 it is."""
    figures = ("itl_p50_ms", "itl_p99_ms", "alone_itl_p50_ms", "prompt_ttft_ms", "stream_tokens_per_s")
    medians = {
        name: {
            key: statistics.median(row[key] for row in rows if row["configuration"] == name)
            for key in figures
        }
        for name in CONFIGURATIONS
    }
    ratios = {}
    for name in ("colocated", "colocated, chunks of 128"):
        ratios[f"{name} / 1P1D"] = {key: medians[name][key] / medians["1P1D"][key] for key in figures}
    return {**ratios, **medians}


def _gate(rows: Sequence[dict[str, Any]]) -> Gate:
    beginnings = {json.dumps(row["beginnings"]) for row in rows}
    return Gate(
        checks={
            "every long prompt was answered with exactly its tokens": all(r["prompts_whole"] for r in rows),
            "the streams' first tokens are the same in every run": len(beginnings) == 1,
        }
    )


def _write_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """ITL p50 and p99 of the running streams, by configuration. Needs matplotlib (the `plot` extra)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    medians = summary(rows)
    figure, axis = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
    for offset, key in ((-0.2, "itl_p99_ms"), (0.2, "itl_p50_ms")):
        places = [index + offset for index in range(len(CONFIGURATIONS))]
        axis.barh(places, [medians[name][key] for name in CONFIGURATIONS], 0.4, label=key)
    axis.set_yticks(range(len(CONFIGURATIONS)), list(CONFIGURATIONS), fontsize=8)
    axis.set_xscale("log")
    axis.set_title("inter-token latency of running streams while long prompts are prefilled (ms)", fontsize=8)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=2, help="long prompts, one after the other")
    parser.add_argument("--quiet-tokens", type=int, default=16, help="tokens of a stream before the prompts")
    parser.add_argument("--add", action="store_true", help="to the record of earlier calls")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
