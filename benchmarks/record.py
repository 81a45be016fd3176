"""The record every benchmark ends with: one JSON document on its last line and in ``benchmarks/results/``."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCHEMA = "kvrelay.benchmark/1"
RESULTS = Path(__file__).parent / "results"


def write_record(
    name: str, settings: dict[str, Any], gate: dict[str, Any], results: Any, directory: Path = RESULTS
) -> dict[str, Any]:
    """Write ``directory/NAME.json``, print the record on one line and return it."""
    record = {
        "schema": SCHEMA,
        "name": name,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "host": host(),
        "settings": settings,
        "gate": gate,
        "results": results,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record), flush=True)
    return record


def host() -> dict[str, Any]:
    """CPU, cores, threads used, GPU and library versions; None where there is none."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
