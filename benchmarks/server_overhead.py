"""What HTTP adds: the same requests through the Python API and through the server over the same engine.

Both run in one process, in turn, with the same engine behind them; the HTTP client is a bare socket in a
process of its own, so that its costs are the kernel's and not a library's.

Time to first token, from handing a request over to its first token in the client's hands, is mostly queueing
at 16 requests at once, and differs by hundreds of milliseconds from round to round. So each request's is
compared with what the engine's ledger says of the very same request: what is left is the way in and the way
out, and what HTTP adds is how much longer these are through the server than through the Python API. A server
of nothing but HTTP (`bare_server.py`) is measured beside ours, to tell what is HTTP's from what our routes
and checks cost; it is no lower bound. The clients begin one after the other and ask for answers of different
lengths: they do not all come at once.
"""

import argparse
import asyncio
import json
import re
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bare_server import start_bare_server
from kvrelay import SamplingParams
from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.llm import AsyncLLM
from kvrelay.server.app import create_app
from kvrelay.server.run import SWITCH_S, DrainingServer, bind
from kvrelay.server_config import ServerConfig

RESULT = Path(__file__).parent / "results" / "server_overhead.json"
MOST_TTFT_MS, MOST_LOSS = 1.0, 0.03
APART_S = 0.05
ASKED = {"temperature": 0, "ignore_eos": True, "stream": True, "kvrelay": True}


def prompt(index: int) -> str:
    """A prompt of its own for each request, so that nothing is reused."""
    return f"{index} " + "the quick brown fox jumps over the lazy dog " * 6


@dataclass(frozen=True, slots=True)
class Round:
    """One round: of each request the client's and the ledger's TTFT in seconds; output tokens per second."""

    ttft_s: list[tuple[float, float]]
    tokens_per_s: float

    @property
    def outside_s(self) -> list[float]:
        """What each request's TTFT holds beside the engine's own."""
        return [seen - ledger for seen, ledger in self.ttft_s]


def num_tokens(number: int, round_number: int, output_tokens: int) -> int:
    """Tokens of one answer: half to one and a half times as many."""
    return output_tokens // 2 + (number * 7 + round_number * 11) % (output_tokens + 1)


def total_tokens(concurrency: int, requests: int, output_tokens: int) -> int:
    """Tokens of a whole round."""
    return sum(num_tokens(n, r, output_tokens) for n in range(concurrency) for r in range(requests))


async def through_python(llm: AsyncLLM, options: argparse.Namespace) -> Round:
    """A round through the Python API."""
    found: list[tuple[float, float]] = []

    async def worker(number: int) -> None:
        await asyncio.sleep(number * APART_S)
        for round_number in range(options.requests):
            count = num_tokens(number, round_number, options.output_tokens)
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            begin_s, first_s = time.monotonic(), None
            async for event in llm.stream(prompt(number * options.requests + round_number), params):
                if first_s is None and event.token_ids:
                    first_s = time.monotonic() - begin_s
                if event.output is not None:
                    found.append((first_s or 0.0, event.output.timings.ttft_s or 0.0))

    begin_s = time.monotonic()
    await asyncio.gather(*(worker(number) for number in range(options.concurrency)))
    elapsed_s = time.monotonic() - begin_s
    total = total_tokens(options.concurrency, options.requests, options.output_tokens)
    return Round(found, total / elapsed_s)


def over_http(port: int, concurrency: int, requests: int, output_tokens: int) -> Round:
    """The same through the server, in a process of its own."""
    found: list[tuple[float, float]] = []

    async def worker(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        await asyncio.sleep(number * APART_S)
        for round_number in range(requests):
            count = num_tokens(number, round_number, output_tokens)
            body = {"prompt": prompt(number * requests + round_number), "max_tokens": count, **ASKED}
            content = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
            begin_s = time.monotonic()
            writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + content)
            await reader.readuntil(b"data: ")
            first_s = time.monotonic() - begin_s
            rest = await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            (ledger_s,) = re.findall(rb'"ttft_s":([0-9.e-]+)', rest)
            found.append((first_s, float(ledger_s)))
        writer.close()

    async def all_workers() -> None:
        await asyncio.gather(*(worker(number) for number in range(concurrency)))

    begin_s = time.monotonic()
    asyncio.run(all_workers())
    elapsed_s = time.monotonic() - begin_s
    return Round(found, total_tokens(concurrency, requests, output_tokens) / elapsed_s)


def start_server(llm: AsyncLLM) -> tuple[DrainingServer, threading.Thread, int]:
    """The server over the engine that `llm` has, on a thread, and its port."""
    config = ServerConfig(port=0)
    listener = bind(config.host, 0)
    server = DrainingServer(create_app(llm.engine, config), config)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return server, thread, port


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of each kind in turn, each first in its turn; the first of each only warms up."""
    llm = AsyncLLM(options.model, mode=options.mode, threads_per_worker=1)
    server, thread, port = start_server(llm)
    ports = {"http": port, "bare": start_bare_server(llm.engine)}
    numbers = (options.concurrency, options.requests, options.output_tokens)
    loop = asyncio.get_running_loop()
    ways = ["python", *ports]
    found: dict[str, list[Round]] = {way: [] for way in ways}
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            for number in range(options.rounds + 1):
                for way in (*ways[number % 3 :], *ways[: number % 3]):
                    if way == "python":
                        one = await through_python(llm, options)
                    else:
                        one = await loop.run_in_executor(pool, over_http, ports[way], *numbers)
                    found[way].append(one)
    finally:
        server.handle_exit(0, None)
        thread.join()
        await llm.close()
    return compare({way: rounds[1:] for way, rounds in found.items()})


def compare(found: dict[str, list[Round]]) -> dict[str, Any]:
    """Medians over all requests, and over the rounds' ratios."""
    both = zip(found["python"], found["http"], strict=True)
    ratios = [ours.tokens_per_s / theirs.tokens_per_s for theirs, ours in both]
    outside_ms, seen_ms = {}, {}
    for way, rounds in found.items():
        outside_ms[way] = 1e3 * statistics.median(s for one in rounds for s in one.outside_s)
        seen_ms[way] = 1e3 * statistics.median(s for one in rounds for s, _ in one.ttft_s)
    return {
        "ttft_p50_ms": seen_ms,
        "outside_the_ledger_p50_ms": outside_ms,
        "added_ttft_p50_ms": outside_ms["http"] - outside_ms["python"],
        "added_by_a_bare_server_ms": outside_ms["bare"] - outside_ms["python"],
        "tokens_per_s": {way: [one.tokens_per_s for one in rounds] for way, rounds in found.items()},
        "throughput_ratio": statistics.median(ratios),
        "throughput_ratios": ratios,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--mode", default="disaggregated", help="colocated leaves one of two cores free")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2, help="of each stream in a round")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    sys.setswitchinterval(SWITCH_S)  # as `kvrelay serve` does; for both ways
    results = asyncio.run(measure(options))
    gate = Gate(
        checks={
            f"TTFT p50 grows by at most {MOST_TTFT_MS:g} ms": results["added_ttft_p50_ms"] <= MOST_TTFT_MS,
            f"throughput falls by at most {MOST_LOSS:.0%}": results["throughput_ratio"] >= 1 - MOST_LOSS,
        }
    )
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    record = make_record("server_overhead", settings, gate, results)
    write_record(record, options.output)
    print(json.dumps(record))
    return 0 if gate.passed else 1


if __name__ == "__main__":
    sys.exit(main())
