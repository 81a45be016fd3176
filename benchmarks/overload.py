"""Far more requests than a server can serve: what it refuses, and how fast it is for those that it takes.

    python benchmarks/overload.py [--model M] [--times 10] [--seconds 30]

A server of its own with room for --queue waiting requests. First one request after the other: the unloaded
time to first token. Then more at once than it has sequences: the sustainable rate R. Then, for so many
seconds, arrivals at random (Poisson) at `times` x R, each with a connection of its own. An accepted request
waits until those queued before it, and two that prefill may hold, have begun: at R that bounds its time to
first token. The gate: nothing fails but by 429 with Retry-After, nine tenths of R are still served, and the
p99 of those that were accepted is within twice the bound. The last line is the JSON record, also written to
benchmarks/results/.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay.config import cache_home
from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.models.hub import resolve
from openai_client import Exchange, ServerError, Target, closed_loop, complete

LEAST_SERVED, MOST_BOUNDS, MOST_IN_FLIGHT = 0.9, 2.0, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`queue`: the server's `max_queued_requests`; `at_once`: its sequences; `prompt` gets a number first."""

    prompt: str
    output_tokens: int
    queue: int
    at_once: int
    times: float
    seconds: float
    num_calm: int = 10


def measure(target: Target, load: Load) -> dict[str, Any]:
    """The three phases against a running server; times in seconds."""
    calm = [complete(target, _prompt(load, n), load.output_tokens) for n in range(load.num_calm)]
    many = [_prompt(load, n) for n in range(100, 100 + 6 * load.at_once)]
    _, took_s = closed_loop(target, many, load.output_tokens, load.at_once + min(load.queue, 4))
    rate = len(many) / took_s
    unloaded_s = max(exchange.ttft_s for exchange in calm)
    found, refused = flood(target, load, rate)
    ttfts = sorted(exchange.ttft_s for exchange in found)
    start_s, end_s = min(one.start_s for one in found), max(one.end_s for one in found)
    return {
        "unloaded_ttft_s": unloaded_s,
        "sustainable_per_s": rate,
        "bound_s": unloaded_s + (load.queue + 2) / rate,
        "offered_per_s": (len(found) + len(refused)) / load.seconds,
        "accepted": len(found),
        "refused": len(refused),
        "refused_otherwise": [str(error)[:200] for error in refused if not _is_polite(error)],
        "served_per_s": len(found) / (end_s - start_s),
        "ttft_p50_s": ttfts[len(ttfts) // 2],
        "ttft_p99_s": ttfts[min(len(ttfts) - 1, int(0.99 * len(ttfts)))],
    }


def flood(target: Target, load: Load, rate: float) -> tuple[list[Exchange], list[ServerError]]:
    """Requests at `times` x `rate` for so many seconds: those that were served, those that were refused."""
    chance, asked = random.Random(0), list[Future[Exchange]]()
    with ThreadPoolExecutor(MOST_IN_FLIGHT) as pool:
        start_s = at_s = time.perf_counter()
        while at_s < start_s + load.seconds:
            time.sleep(max(0.0, at_s - time.perf_counter()))
            asked.append(pool.submit(complete, target, _prompt(load, 1000 + len(asked)), load.output_tokens))
            at_s += chance.expovariate(load.times * rate)
    found: list[Exchange] = []
    refused: list[ServerError] = []
    for one in asked:
        try:
            found.append(one.result())
        except ServerError as error:
            refused.append(error)
    return found, refused


def gate_of(results: dict[str, Any]) -> Gate:
    """The bars."""
    served = results["served_per_s"] / results["sustainable_per_s"]
    return Gate(
        checks={
            "what is not served is refused by 429 with Retry-After": not results["refused_otherwise"],
            "most of what came was too much": results["refused"] > results["accepted"],
            f"at least {LEAST_SERVED:.0%} of the sustainable rate is served": served >= LEAST_SERVED,
            f"accepted requests' p99 TTFT is within {MOST_BOUNDS:g}x of the bound": results["ttft_p99_s"]
            <= MOST_BOUNDS * results["bound_s"],
        }
    )


def _prompt(load: Load, number: int) -> str:
    """No two begin alike, so that nothing is reused."""
    return f"{number} {load.prompt}"


def _is_polite(error: ServerError) -> bool:
    return error.status == 429 and error.retry_after_s is not None and error.retry_after_s >= 1


@contextmanager
def kvrelay_server(model: str, *settings: str) -> Iterator[str]:
    """The URL of a server on a free port, with these `--set` pairs."""
    command = [sys.executable, "-m", "kvrelay", "serve", "--model", model, "--port", "0"]
    command += [part for pair in settings for part in ("--set", pair)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}{process.stderr.read()}")
        yield found.group()
    finally:
        process.terminate()
        process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--queue", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    load = Load(
        prompt="the quick brown fox jumps over the lazy dog " * 6,
        output_tokens=options.output_tokens,
        queue=options.queue,
        at_once=options.at_once,
        times=options.times,
        seconds=options.seconds,
    )
    limits = (f"max_queued_requests={load.queue}", f"max_num_seqs={load.at_once}")
    directory = str(resolve(options.model, cache_home()))
    with kvrelay_server(directory, *limits, "served_model_name=served") as url:
        results = measure(Target("kvrelay", url, "served", {"ignore_eos": True}), load)
    gate = gate_of(results)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    record = make_record("overload", settings, gate, results)
    write_record(record, options.out / "overload.json")
    print(json.dumps(record))
    return 0 if gate.passed else 1


if __name__ == "__main__":
    sys.exit(main())
