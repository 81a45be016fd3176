"""Replay a slice of a public trace against any OpenAI-compatible server, at its own arrival times.

    python benchmarks/replay.py TRACE --server kvrelay-1P1D [--requests 40] [--length-scale 0.1] [--speed 1.0]

TRACE is Mooncake's JSONL (`timestamp` in ms, `input_length`, `output_length`, `hash_ids` of 512-token
blocks) or Azure's CSV (`TIMESTAMP,ContextTokens,GeneratedTokens`). Lengths are multiplied by
`--length-scale` (a trace of a large model, for a small one) and time runs `--speed` times as fast. Prompts
are token ids: a block of a Mooncake prompt is made from its hash id, so that prompts share prefixes exactly
where the trace says so.

Reports time to first token, inter-token latency, tokens/s, and goodput: requests per second that kept both
`--slo-ttft-ms` and `--slo-itl-ms` (their mean gap). A request that fails counts against goodput and is
reported; the gate is that every one that did not fail was answered with exactly its tokens. The last line
is the JSON record, also under benchmarks/results/. Sources: kvcache-ai/Mooncake; Azure/AzurePublicDataset.
"""

import argparse
import csv
import json
import random
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from kvrelay.config import cache_home
from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.models.hub import resolve
from openai_client import Exchange, ServerError, Target, complete
from servers import find_target, is_up, started

BLOCK_TOKENS = 512  # of Mooncake's hash ids
VOCABULARY = range(1000, 9000)  # ordinary tokens of every vocabulary we know


@dataclass(frozen=True, slots=True)
class Arrival:
    """One row of a trace; `prefix_ids` names its blocks, equal ids being equal text."""

    at_s: float
    input_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> Iterator[Arrival]:
    """Rows in the file's order, times from its first row. Raises `SystemExit` naming a malformed row."""
    rows = _mooncake if path.suffix == ".jsonl" else _azure
    with path.open(newline="") as lines:
        first_s = None
        for number, row in enumerate(lines if path.suffix == ".jsonl" else csv.DictReader(lines), 1):
            try:
                arrival = rows(row)
            except (KeyError, TypeError, ValueError) as error:
                raise SystemExit(f"{path}: row {number}: {type(error).__name__}: {error}") from None
            first_s = arrival.at_s if first_s is None else first_s
            yield Arrival(arrival.at_s - first_s, *_lengths(arrival), arrival.prefix_ids)


def _lengths(arrival: Arrival) -> tuple[int, int]:
    return arrival.input_tokens, arrival.output_tokens


def _mooncake(line: Any) -> Arrival:
    row = json.loads(line)
    ids = tuple(row["hash_ids"])
    return Arrival(row["timestamp"] / 1e3, int(row["input_length"]), int(row["output_length"]), ids)


def _azure(row: Any) -> Arrival:
    at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
    return Arrival(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def prompt_of(arrival: Arrival, index: int, scale: float) -> list[int]:
    """Token ids of the scaled length; each block comes from its id, so equal beginnings stay equal."""
    length, block = max(1, round(arrival.input_tokens * scale)), max(1, round(BLOCK_TOKENS * scale))
    ids = arrival.prefix_ids or [f"request {index}"]
    tokens: list[int] = []
    for number in range(-(-length // block)):
        name = ids[number] if number < len(ids) else f"{ids[-1]}+{number}"
        tokens += random.Random(str(name)).choices(VOCABULARY, k=block)
    return tokens[:length]


def replay(target: Target, arrivals: Sequence[Arrival], scale: float, speed: float) -> list[Exchange | str]:
    """Send each at its time, whatever the server is doing: its exchange, or the error it ended with."""
    outcomes: list[Exchange | str] = [""] * len(arrivals)

    def send(index: int, arrival: Arrival) -> None:
        output = max(1, round(arrival.output_tokens * scale))
        try:
            outcomes[index] = complete(target, prompt_of(arrival, index, scale), output, index)
        except (OSError, ServerError) as error:
            outcomes[index] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=send, args=item) for item in enumerate(arrivals)]
    start_s = time.perf_counter()
    for thread, arrival in zip(threads, arrivals, strict=True):
        time.sleep(max(0.0, start_s + arrival.at_s / speed - time.perf_counter()))
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def figures(outcomes: Sequence[Exchange | str], slo_ttft_ms: float, slo_itl_ms: float) -> dict[str, Any]:
    """What the whole replay came to."""
    done = [outcome for outcome in outcomes if isinstance(outcome, Exchange)]
    if not done:
        raise SystemExit(f"no request succeeded; the first said: {outcomes[0]}")
    elapsed_s = max(e.end_s for e in done) - min(e.start_s for e in done)
    ttfts = sorted(1e3 * e.ttft_s for e in done)
    gaps = sorted(1e3 * gap for e in done for gap in e.gaps_s) or [0.0]
    good = [e for e in done if 1e3 * e.ttft_s <= slo_ttft_ms and _mean_gap_ms(e) <= slo_itl_ms]
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(done),
        "errors": sorted({outcome for outcome in outcomes if isinstance(outcome, str)})[:5],
        "ttft_p50_ms": ttfts[len(ttfts) // 2],
        "ttft_p99_ms": ttfts[int(0.99 * len(ttfts))],
        "itl_p50_ms": gaps[len(gaps) // 2],
        "itl_p99_ms": gaps[int(0.99 * len(gaps))],
        "tokens_per_s": sum(e.num_tokens for e in done) / elapsed_s,
        "goodput_per_s": len(good) / elapsed_s,
        "kept_slo": len(good) / len(outcomes),
    }


def _mean_gap_ms(exchange: Exchange) -> float:
    return 1e3 * statistics.mean(exchange.gaps_s) if exchange.gaps_s else 0.0


def main() -> None:
    """Replay, print, record."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must not outlive us
    directory = str(resolve(options.model, cache_home()))
    arrivals = list(islice(read_trace(options.trace), options.requests))
    target = find_target(options.server, directory)
    with ExitStack() as stack:
        if not is_up(target):
            stack.enter_context(started(target.name, directory, options.dtype))
        outcomes = replay(target, arrivals, options.length_scale, options.speed)
    results = figures(outcomes, options.slo_ttft_ms, options.slo_itl_ms)
    exact = [
        (e.num_prompt_tokens, e.num_tokens)
        == tuple(max(1, round(n * options.length_scale)) for n in _lengths(arrivals[e.prompt]))
        for e in outcomes
        if isinstance(e, Exchange)
    ]
    gate = Gate(checks={"every request that did not fail was answered with exactly its tokens": all(exact)})
    for key, value in results.items():
        print(f"{key:16} {value:.4g}" if isinstance(value, float) else f"{key:16} {value}")
    settings = {**vars(options), "trace": options.trace.name}
    record = make_record(options.record, settings, gate, results)
    write_record(record, Path(__file__).parent / "results" / f"{options.record}.json")
    print(json.dumps(record))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--server", required=True, metavar="NAME[=URL]")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a pulled name or a directory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--length-scale", type=float, default=0.1)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--slo-ttft-ms", type=float, default=2000.0)
    parser.add_argument("--slo-itl-ms", type=float, default=100.0)
    parser.add_argument("--record", default="replay")
    return parser.parse_args()


if __name__ == "__main__":
    main()
