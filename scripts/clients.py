"""Installs other people's clients, runs each against one server, and compares their counts with the server's.

A client passes when nothing failed and the requests and tokens it reports are those that `/metrics` gained;
AIPerf's mean TTFT and inter-token latency must also be within 5 % of those of the histograms.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client_programs import CLIENTS, MODEL, ClientFailed, Counts, Scene
from kvrelay.config import cache_home
from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.models import hub

TOTALS = {
    "prompt_tokens_total": "prompt",
    "generation_tokens_total": "output",
    "request_failure_total": "failed",
}
LATENCIES = {"time_to_first_token_seconds": "ttft", "inter_token_latency_seconds": "itl"}
MOST_APART = 0.05
MAX_MODEL_LEN = 128  # schemathesis asks for as much as the schema allows: hundreds of answers to the brim
TITLES = (
    "client",
    "failed",
    "requests",
    "prompt tokens",
    "output tokens",
    "mean TTFT, ms",
    "mean ITL, ms",
    "note",
)
RECORD = Path("benchmarks/results/clients.json")


def served(url: str) -> dict[str, float]:
    """Totals of `/metrics` that clients count too; of latencies the sum in seconds and the count."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        rows = re.findall(r"(?m)^kvrelay:(\w+)(?:\{([^}]*)\})? (\S+)$", answer.read().decode())
    names = TOTALS | {
        f"{name}_{end}": f"{key}_{end}" for name, key in LATENCIES.items() for end in ("sum", "count")
    }
    totals = dict.fromkeys((*names.values(), "completed"), 0.0)
    for name, labels, value in rows:
        if name in names:
            totals[names[name]] += float(value)
        if name == "request_success_total" and "abort" not in labels:
            totals["completed"] += float(value)
    return totals


def compare(counts: Counts, gained: dict[str, float]) -> tuple[bool, list[str]]:
    """Whether both sides say the same, and the cells `theirs / ours`."""
    pairs = [(counts.completed, gained["completed"])]
    pairs += [(counts.prompt_tokens, gained["prompt"]), (counts.output_tokens, gained["output"])]
    agree = not counts.failed and not gained["failed"]
    agree = agree and all(theirs is None or theirs == ours for theirs, ours in pairs)
    cells = [f"{'-' if theirs is None else theirs} / {ours:.0f}" for theirs, ours in pairs]
    for theirs_ms, key in ((counts.ttft_ms, "ttft"), (counts.itl_ms, "itl")):
        ours_ms = 1e3 * gained[f"{key}_sum"] / max(1.0, gained[f"{key}_count"])
        cells.append("-" if theirs_ms is None else f"{theirs_ms:.1f} / {ours_ms:.1f}")
        if theirs_ms is not None and counts.same_latencies:
            agree = agree and abs(ours_ms / theirs_ms - 1) <= MOST_APART
    return agree, cells


def try_one(name: str, scene: Scene) -> tuple[bool, list[str]]:
    """Run one client: whether it passed, and its row of the table."""
    before = served(scene.url)
    try:
        counts = CLIENTS[name](scene)
    except (ClientFailed, KeyError) as error:  # it did not run, or its report has another shape
        return False, [
            name,
            *["-"] * 6,
            f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:90]}",
        ]
    time.sleep(1.0)  # what the client left behind ends
    after = served(scene.url)
    agree, cells = compare(counts, {key: after[key] - before[key] for key in after})
    return agree, [name, str(counts.failed), *cells, counts.note]


@contextmanager
def server(url: str | None) -> Iterator[str]:
    """The URL given, or that of a server started here."""
    if url is not None:
        yield url
        return
    command = [sys.executable, "-m", "kvrelay", "serve", "--model", MODEL, "--port", "0"]
    command += ["--power-model", "idle_w=5,busy_w=20", "--set", f"max_model_len={MAX_MODEL_LEN}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        if " is served at " not in line:
            raise SystemExit(f"the server did not start: {line}{process.stderr.read()}")
        yield line.split(" at ")[1].strip()
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="*", help=f"of {', '.join(CLIENTS)}; all without any")
    parser.add_argument("--url", help="a running server of the model; without, one is started")
    parser.add_argument("--record", action="store_true", help=f"write the table to {RECORD} too")
    options = parser.parse_args()
    home = Path(os.environ.get("KVRELAY_CLIENTS") or Path(tempfile.gettempdir(), "kvrelay-clients"))
    home.mkdir(parents=True, exist_ok=True)
    rows: dict[str, tuple[bool, list[str]]] = {}
    print("counts and latencies are the client's / those of /metrics")
    print("      ", " | ".join(TITLES))
    with server(options.url) as url:
        scene = Scene(url.rstrip("/"), hub.pull(MODEL, cache_home()), home)
        for name in options.clients or CLIENTS:
            good, row = rows[name] = try_one(name, scene)
            print("ok    " if good else "FAILED", " | ".join(row), flush=True)
    gate = Gate(checks={name: good for name, (good, _) in rows.items()})
    if options.record:
        table = [dict(zip(TITLES, row, strict=True)) for _, row in rows.values()]
        write_record(make_record("clients", vars(options), gate, {"theirs / ours": table}), RECORD)
    return 0 if gate.passed else 1


if __name__ == "__main__":
    sys.exit(main())
