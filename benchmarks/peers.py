"""The same requests, client and clock against kvrelay and what a user would otherwise pick.

    python benchmarks/peers.py --server kvrelay-1P1D --server vllm --server other=http://127.0.0.1:9000 \\
        [--cells 256x64@1 2048x64@4 …] [--rounds 3] [--dtype bfloat16] [--add]

A cell is PROMPTxOUTPUT@CONCURRENCY, in tokens and requests in flight. A peer named in `servers.PEERS` that
does not answer on its port is started, and ended at the end; the others wait, idle, while one is measured
(those that `spins` says keep cores busy without requests are stopped meanwhile: let them be started here).
The order turns round with every round. Prompts are windows of real text, each with its own beginning (no
prefix cache helps) and exactly as many tokens as its cell says.

The gate: every request was answered with exactly its tokens; texts agree with the first server's (in float32
wholly; in bfloat16, where near-ties fall either way, in the first 16 characters of at least half of the
requests of each cell, over all of its rounds); the machine was idle before each run. Ratios first; the last
line is the JSON record, also in benchmarks/results/ with a plot beside it. `--add` adds this call's rounds to
the record of earlier calls at the same commit.
"""

import argparse
import itertools
import json
import random
import re
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kvrelay.config import cache_home
from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.models.hub import resolve
from kvrelay.models.tokenizer import Tokenizer
from load import earlier_results
from openai_client import Exchange, Target, closed_loop
from peers_report import print_ratios, summary, write_plot
from servers import PEERS, Running, find_target, is_up, started, stopped

RESULTS = Path(__file__).parent / "results"
TEXTS = Path(__file__).parent / "texts"
CELLS = ("256x64@1", "256x64@4", "256x64@16", "2048x64@1", "2048x64@4")
FIRST_CHARACTERS = 16
IDLE_PERCENT = 15.0  # of all cores: the noise of a machine on which nobody works
IDLE_WITHIN_S = 60.0  # so long a run waits for that; the gate fails where it did not come


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the workload."""

    prompt_tokens: int
    output_tokens: int
    concurrency: int

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """From `256x64@4`. Raises `argparse.ArgumentTypeError`."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)@([1-9]\d*)", text)
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r}: expected PROMPTxOUTPUT@CONCURRENCY, as in 256x64@4")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.prompt_tokens}x{self.output_tokens}@{self.concurrency}"


def main() -> None:
    """Measure, print, record."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a timeout ends as Ctrl-C does
    directory = resolve(options.model, cache_home())
    targets = [find_target(spec, str(directory)) for spec in options.server]
    tokenizer = Tokenizer.from_directory(directory)
    runs: list[dict[str, Any]] = []
    running: dict[str, Running] = {}
    try:
        with ExitStack() as stack:
            for asked in targets:
                if asked.name in PEERS and not is_up(asked):
                    peer = stack.enter_context(started(asked.name, str(directory), options.dtype))
                    running[asked.name] = peer
                    print(f"{asked.name}: first token {peer.start_s:.1f} s after the start", flush=True)
            spinning = {name: peer.group for name, peer in running.items() if PEERS[name].spins}
            for index, cell in itertools.product(range(options.rounds), options.cells):
                seed = f"{options.seed}/{cell}/{index}"
                texts = prompts(tokenizer, cell, seed, options.waves)
                runs += run_round(targets, cell, texts, index, spinning)
    except KeyboardInterrupt:
        print("interrupted: what was measured of every server is recorded")
    path = RESULTS / f"{options.record}.json"
    earlier = earlier_results(path) if options.add else {"runs": [], "starts_s": {}, "commands": []}
    write(options, path, earlier, runs, {name: peer.start_s for name, peer in running.items()})


def run_round(
    targets: Sequence[Target], cell: Cell, texts: list[str], index: int, spinning: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One cell against every server in turn; one row of figures each, texts compared with the first's."""
    rows: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[str]] = {}
    for asked in reversed(targets) if index % 2 else targets:
        with stopped(list(spinning.values())):
            busy = _busy_percent()
        with stopped([group for name, group in spinning.items() if name != asked.name]):
            closed_loop(asked, [texts[0][: len(texts[0]) // 4]], 4, 1)  # wake it up
            exchanges, elapsed_s = closed_loop(asked, texts, cell.output_tokens, cell.concurrency)
        row = {"server": asked.name, "cell": str(cell), "round": index, "busy_percent": busy}
        rows[asked.name] = {**row, **figures(exchanges, elapsed_s, cell)}
        answers[asked.name] = [exchange.text for exchange in exchanges]
        print(json.dumps({key: rows[asked.name][key] for key in SHOWN}), flush=True)
    for name, row in rows.items():
        pairs = list(zip(answers[name], answers[targets[0].name], strict=True))
        row["same_beginning"] = sum(a[:FIRST_CHARACTERS] == b[:FIRST_CHARACTERS] for a, b in pairs) / len(
            pairs
        )
        row["same_text"] = sum(a == b for a, b in pairs) / len(pairs)
    return list(rows.values())


def _busy_percent() -> float:
    """Of all cores, once the machine is idle or a minute is over; some servers spin for a while."""
    deadline_s = time.monotonic() + IDLE_WITHIN_S
    time.sleep(1.0)
    while (busy := psutil.cpu_percent(1.0)) > IDLE_PERCENT and time.monotonic() < deadline_s:
        time.sleep(1.0)
    return busy


SHOWN = ("cell", "server", "tokens_per_s", "ttft_ms", "tpot_ms", "itl_p99_ms", "busy_percent")


def figures(exchanges: Sequence[Exchange], elapsed_s: float, cell: Cell) -> dict[str, Any]:
    """Throughput over the whole run; medians over its requests; and what the gate looks at."""
    gaps = sorted(gap for exchange in exchanges for gap in exchange.gaps_s)
    spans = [(e.piece_s[-1] - e.piece_s[0]) / max(1, e.num_tokens - 1) for e in exchanges]
    return {
        "tokens_per_s": sum(e.num_tokens for e in exchanges) / elapsed_s,
        "ttft_ms": 1e3 * statistics.median(e.ttft_s for e in exchanges),
        "tpot_ms": 1e3 * statistics.median(spans),
        "itl_p99_ms": 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))] if gaps else None,
        "elapsed_s": elapsed_s,
        "token_counts_exact": all(
            (e.num_prompt_tokens, e.num_tokens) == (cell.prompt_tokens, cell.output_tokens) for e in exchanges
        ),
    }


def prompts(tokenizer: Tokenizer, cell: Cell, seed: str, waves: int = 2) -> list[str]:
    """`waves` requests for each in flight: windows of the texts that encode to exactly the cell's tokens."""
    source = random.Random(seed)
    tokens = [token for path in sorted(TEXTS.glob("*.txt")) for token in tokenizer.encode(path.read_text())]
    found: list[str] = []
    while len(found) < waves * cell.concurrency:
        head = tokenizer.encode(f"Part {source.randrange(10**9):09d}.\n")
        start = source.randrange(len(tokens) - cell.prompt_tokens)
        window = head + tokens[start : start + cell.prompt_tokens - len(head)]
        text = tokenizer.decode(window)
        if len(tokenizer.encode(text)) == cell.prompt_tokens:  # a cut through a character does not come back
            found.append(text)
    return found


def write(
    options: argparse.Namespace,
    path: Path,
    earlier: dict[str, Any],
    runs: list[dict[str, Any]],
    starts: dict[str, float],
) -> None:
    """Summarise what was measured in all calls, and leave record and plot."""
    if not runs:
        raise SystemExit("no cell was measured on every server: no record")
    runs = earlier["runs"] + runs
    cells = summary(runs)
    checks = gate(runs, options.dtype)
    print_ratios(cells)
    settings = {key: str(value) if key == "cells" else value for key, value in vars(options).items()}
    record = make_record(path.stem, {**settings, "cells": sorted({r["cell"] for r in runs})}, checks, {})
    record["results"] = {
        "cells": cells,
        "starts_s": {**earlier["starts_s"], **starts},
        "commands": [*earlier["commands"], record["command"]],
        "runs": runs,
    }
    print(f"gate: {checks.checks}")
    write_record(record, path)
    write_plot(cells, path.with_suffix(".png"))
    print(json.dumps(record))


def gate(runs: Sequence[dict[str, Any]], dtype: str) -> Gate:
    """Counts exact and machine idle in every run; servers agree over the rounds of a cell."""
    agreement, least = ("same_text", 1.0) if dtype == "float32" else ("same_beginning", 0.5)
    rounds: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        rounds.setdefault((run["server"], run["cell"]), []).append(run[agreement])
    return Gate(
        checks={
            "every request was answered with exactly its tokens": all(r["token_counts_exact"] for r in runs),
            f"{agreement} as the first server in at least {least:.0%} of a cell's requests": all(
                statistics.mean(shares) >= least for shares in rounds.values()
            ),
            f"at most {IDLE_PERCENT:.0f} % of the cores busy before each run": all(
                run["busy_percent"] <= IDLE_PERCENT for run in runs
            ),
        }
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", action="append", required=True, metavar="NAME[=URL]")
    parser.add_argument("--cells", nargs="+", type=Cell.parse, default=[Cell.parse(cell) for cell in CELLS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waves", type=int, default=2, help="requests of a cell, over those in flight")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a pulled name or a directory")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other prompts")
    parser.add_argument("--record", default="peers", help="name of the record under benchmarks/results")
    parser.add_argument("--add", action="store_true", help="to the record of earlier calls")
    return parser.parse_args()


if __name__ == "__main__":
    main()
