"""Writes the record every benchmark ends with: one JSON document on the last line and in ``results/``.

Knows the host and the commit. Knows nothing of what was measured.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SCHEMA = "kvrelay.benchmark/1"
RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "triton", "numpy", "transformers")


def write_record(
    name: str,
    *,
    settings: dict[str, Any],
    gate: dict[str, Any],
    results: Any,
    keep: bool = True,
    directory: Path = RESULTS,
) -> dict[str, Any]:
    """Print the record as the last line and, if ``keep``, write ``<directory>/<name>.json``.

    gate: what was checked, with a bool under ``passed``.
    """
    record = {
        "schema": SCHEMA,
        "name": name,
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "host": host(),
        "settings": settings,
        "gate": gate,
        "results": results,
    }
    if keep:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return record


def host() -> dict[str, Any]:
    """Processor, cores, GPU and library versions; None where there is none."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    return _run("git", "-C", str(Path(__file__).parent), *arguments)


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
