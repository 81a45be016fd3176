"""The same requests through one colocated worker and through 1 prefill + 1 decode, on the same cores.

    python benchmarks/disaggregation.py [--rounds 3] [--concurrency 4] [--requests 12] …

Prints medians over the rounds and their ratio; the last line is the JSON record, also written to
benchmarks/results/. The gate: every round of both produced the same tokens (float32, greedy).
"""

import argparse
import json
import queue
import random
import statistics
from pathlib import Path
from typing import Any

from kvrelay import LLM, RequestOutput, SamplingParams
from kvrelay.experiments.record import Gate, make_record, write_record

MODES: dict[str, dict[str, Any]] = {"colocated": {"mode": "colocated"}, "1P1D": {"mode": "disaggregated"}}


def main() -> None:
    """Run, print, record."""
    options = _options()
    params = SamplingParams(max_tokens=options.output_tokens, temperature=0.0, ignore_eos=True)
    rounds: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    tokens = set()
    for index in range(options.rounds):
        for mode in sorted(MODES, reverse=bool(index % 2)):
            with LLM(options.model, dtype="float32", **MODES[mode]) as llm:
                prompts = _prompts(options, llm.engine.spec.vocab_size)
                llm.generate([prompts[0][:65]], SamplingParams(max_tokens=2, ignore_eos=True))  # warm up
                outputs = _closed_loop(llm, prompts, params, options.concurrency)
            rounds[mode].append(_figures(outputs))
            tokens.add(json.dumps([output.token_ids for output in outputs]))
            print(f"round {index} {mode:10} {rounds[mode][-1]}")
    gate = Gate(checks={"all rounds of both modes produced the same tokens": len(tokens) == 1})
    results = _results(rounds)
    for name, row in results.items():
        print(f"{name:30} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(f"gate: {gate.checks}")
    record = make_record("disaggregation", vars(options), gate, {"medians": results, "rounds": rounds})
    write_record(record, Path(__file__).parent / "results" / "disaggregation.json")
    print(json.dumps(record))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    return parser.parse_args()


def _prompts(options: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    source = random.Random(0)
    return [
        [source.randrange(100, vocab_size) for _ in range(options.prompt_tokens)]
        for _ in range(options.requests)
    ]


def _closed_loop(
    llm: LLM, prompts: list[list[int]], params: SamplingParams, concurrency: int
) -> list[RequestOutput]:
    """Keep `concurrency` requests in flight until all are done; outputs in the prompts' order."""
    done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    outputs: dict[int, RequestOutput] = {}
    waiting = list(enumerate(prompts))

    def start() -> None:
        index, prompt = waiting.pop(0)
        llm.engine.submit(llm.engine.prepare(prompt, params), lambda event: done.put((index, event)))

    for _ in range(min(concurrency, len(waiting))):
        start()
    while len(outputs) < len(prompts):
        index, event = done.get()
        if event.error is not None:
            raise event.error
        if event.output is not None:
            outputs[index] = event.output
            if waiting:
                start()
    return [outputs[index] for index in range(len(prompts))]


def _figures(outputs: list[RequestOutput]) -> dict[str, float]:
    gaps = sorted(gap for output in outputs for gap in output.timings.itl_s)
    ttfts = [output.timings.ttft_s or 0.0 for output in outputs]
    waits = [output.timings.transfer_wait_s for output in outputs]
    num_tokens = sum(len(output.token_ids) for output in outputs)
    busy_s = sum(output.timings.e2e_s for output in outputs)
    return {
        "ttft_ms": 1e3 * statistics.median(ttfts),
        "itl_p50_ms": 1e3 * gaps[len(gaps) // 2],
        "itl_p99_ms": 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "tokens_per_s_per_stream": num_tokens / busy_s,
        "transfer_wait_share_of_ttft": sum(waits) / sum(ttfts),
    }


def _results(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    medians = {
        mode: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for mode, rows in rounds.items()
    }
    ratios = {
        key: medians["1P1D"][key] / medians["colocated"][key]
        for key in medians["1P1D"]
        if medians["colocated"][key]
    }
    return {**medians, "1P1D over colocated": ratios}


if __name__ == "__main__":
    main()
