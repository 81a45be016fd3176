"""What HTTP adds: the same requests through the Python API and through the server over the same engine.

Both run in one process, alternating, with the same engine behind them; the HTTP client is a bare socket in a
process of its own, so that its costs are the kernel's and not a library's. TTFT: from handing a request over
to its first token in the client's hands.
"""

import argparse
import asyncio
import json
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kvrelay import SamplingParams
from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.llm import AsyncLLM
from kvrelay.server.app import create_app
from kvrelay.server.run import DrainingServer, bind
from kvrelay.server_config import ServerConfig

RESULT = Path(__file__).parent / "results" / "server_overhead.json"
MOST_TTFT_MS, MOST_LOSS = 1.0, 0.03


def prompt(index: int) -> str:
    """A prompt of its own for each request, so that nothing is reused."""
    return f"{index} " + "the quick brown fox jumps over the lazy dog " * 6


async def through_python(llm: AsyncLLM, options: argparse.Namespace) -> tuple[list[float], float]:
    """TTFTs in seconds, and output tokens per second."""
    params = SamplingParams(max_tokens=options.output_tokens, temperature=0.0, ignore_eos=True)
    first_s: list[float] = []

    async def worker(number: int) -> None:
        for round_number in range(options.requests):
            begin_s = time.monotonic()
            waiting = True
            async for event in llm.stream(prompt(number * options.requests + round_number), params):
                if waiting and event.token_ids:
                    first_s.append(time.monotonic() - begin_s)
                    waiting = False

    begin_s = time.monotonic()
    await asyncio.gather(*(worker(number) for number in range(options.concurrency)))
    elapsed_s = time.monotonic() - begin_s
    return first_s, options.concurrency * options.requests * options.output_tokens / elapsed_s


def over_http(port: int, concurrency: int, requests: int, output_tokens: int) -> tuple[list[float], float]:
    """The same through the server, in a process of its own."""
    first_s: list[float] = []

    async def worker(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for round_number in range(requests):
            body = json.dumps(
                {
                    "prompt": prompt(number * requests + round_number),
                    "max_tokens": output_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                }
            ).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            begin_s = time.monotonic()
            writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
            await reader.readuntil(b"data: ")
            first_s.append(time.monotonic() - begin_s)
            await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()

    async def all_workers() -> None:
        await asyncio.gather(*(worker(number) for number in range(concurrency)))

    begin_s = time.monotonic()
    asyncio.run(all_workers())
    elapsed_s = time.monotonic() - begin_s
    return first_s, concurrency * requests * output_tokens / elapsed_s


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
    """Alternating rounds; the first of each kind warms up and is not counted."""
    found: dict[str, list[tuple[float, float]]] = {"python": [], "http": []}
    llm = AsyncLLM(options.model, threads_per_worker=1)
    server, thread, port = start_server(llm)
    numbers = (port, options.concurrency, options.requests, options.output_tokens)
    loop = asyncio.get_running_loop()
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            for _ in range(options.rounds + 1):
                first_s, pace = await through_python(llm, options)
                found["python"].append((statistics.median(first_s) * 1000, pace))
                first_s, pace = await loop.run_in_executor(pool, over_http, *numbers)
                found["http"].append((statistics.median(first_s) * 1000, pace))
    finally:
        server.handle_exit(0, None)
        thread.join()
        await llm.close()
    rounds = {way: values[1:] for way, values in found.items()}
    ttft_ms = {way: statistics.median(one[0] for one in values) for way, values in rounds.items()}
    pace = {way: statistics.median(one[1] for one in values) for way, values in rounds.items()}
    pairs = zip(rounds["python"], rounds["http"], strict=True)
    added = [http[0] - python[0] for python, http in pairs]
    return {
        "ttft_p50_ms": ttft_ms,
        "tokens_per_s": pace,
        "added_ttft_p50_ms": statistics.median(added),
        "throughput_ratio": pace["http"] / pace["python"],
        "rounds": rounds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2, help="of each stream in a round")
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
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
