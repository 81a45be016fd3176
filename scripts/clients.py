"""Installs other people's clients, runs each against one server, and compares their counts with the server's.

A client passes when nothing failed and the requests and tokens it reports are those that `/metrics` gained.
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

from client_programs import CLIENTS, MODEL, Scene
from kvrelay.config import cache_home
from kvrelay.models import hub


def served(url: str) -> dict[str, float]:
    """Totals of `/metrics` that clients count too."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
    rows = re.findall(r"(?m)^kvrelay:(\w+)(?:\{([^}]*)\})? (\S+)$", text)
    names = {
        "prompt_tokens_total": "prompt",
        "generation_tokens_total": "output",
        "request_failure_total": "failed",
    }
    totals = dict.fromkeys((*names.values(), "completed"), 0.0)
    for name, labels, value in rows:
        if name in names:
            totals[names[name]] += float(value)
        if name == "request_success_total" and "abort" not in labels:
            totals["completed"] += float(value)
    return totals


def try_one(name: str, scene: Scene) -> tuple[bool, list[str]]:
    """Run one client: whether it passed, and its row of the table."""
    before = served(scene.url)
    try:
        counts = CLIENTS[name](scene)
    except Exception as error:  # noqa: BLE001  a client that cannot run is a row that says why
        return False, [name, "-", "-", "-", "-", str(error).strip().splitlines()[-1][:90]]
    time.sleep(1.0)
    after = served(scene.url)
    gained = {key: int(after[key] - before[key]) for key in after}
    pairs = [(counts.completed, gained["completed"])]
    pairs += [(counts.prompt_tokens, gained["prompt"]), (counts.output_tokens, gained["output"])]
    agree = all(theirs is None or theirs == ours for theirs, ours in pairs)
    cells = [f"{'-' if theirs is None else theirs} / {ours}" for theirs, ours in pairs]
    return agree and not counts.failed and not gained["failed"], [
        name,
        str(counts.failed),
        *cells,
        counts.note,
    ]


@contextmanager
def server(url: str | None) -> Iterator[str]:
    """The URL given, or that of a server started here."""
    if url is not None:
        yield url
        return
    command = [sys.executable, "-m", "kvrelay", "serve", "--model", MODEL, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--power-model", "idle_w=5,busy_w=20"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        yield line.split(" at ")[1].strip()
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="*", help=f"of {', '.join(CLIENTS)}; all without any")
    parser.add_argument("--url", help="a running server of the model; without, one is started")
    options = parser.parse_args()
    home = Path(os.environ.get("KVRELAY_CLIENTS") or Path(tempfile.gettempdir(), "kvrelay-clients"))
    home.mkdir(parents=True, exist_ok=True)
    passed = True
    print("client | failed | requests, theirs / ours | prompt tokens | output tokens |")
    with server(options.url) as url:
        scene = Scene(url.rstrip("/"), hub.pull(MODEL, cache_home()), home)
        for name in options.clients or CLIENTS:
            good, row = try_one(name, scene)
            passed &= good
            print("ok    " if good else "FAILED", " | ".join(row), flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
