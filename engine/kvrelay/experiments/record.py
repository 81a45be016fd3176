"""The JSON document every benchmark ends with: where a figure came from, and whether to believe it.

Needs the standard library alone: `benchmarks/attention_gpu.py` runs it where the engine is not installed.
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = "kvrelay.record/1"
LEFT_BY_PROGRAMS = ("benchmarks/results", "docs/*.png")  # what earlier ones left changes nothing that runs
LIBRARIES = ("kvrelay", "torch", "triton", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The correctness check beside the figures: each condition by name, and whether all held."""

    checks: dict[str, bool]

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(self.checks.values())


def make_record(name: str, settings: dict[str, Any], gate: Gate, results: dict[str, Any]) -> dict[str, Any]:
    """The record of one run of one program, ready for `write_record`."""
    commit, dirty = _source_state()
    return {
        "schema": SCHEMA,
        "name": name,
        "command": _command(sys.argv),
        "commit": commit,
        "dirty": dirty,
        "host": host(),
        "settings": settings,
        "gate": {"passed": gate.passed, "checks": gate.checks},
        "results": results,
    }


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write the record as indented JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def host() -> dict[str, Any]:
    """Processor, cores, boards and library versions of this machine."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "gpu": _gpu(),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
    }


def _gpu() -> list[str] | None:
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().splitlines()


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    rows = path.read_text().splitlines() if path.exists() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _source_state() -> tuple[str | None, bool | None]:
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        others = [f":!/{pattern}" for pattern in LEFT_BY_PROGRAMS]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *others)
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _command(arguments: list[str]) -> str:
    is_package = Path(arguments[0]).name == "__main__.py"
    return " ".join(
        [
            "python",
            *(["-m", "kvrelay"] if is_package else _relative(arguments[:1])),
            *_relative(arguments[1:]),
        ]
    )


def _relative(arguments: list[str]) -> list[str]:
    """The command without the machine's own paths."""
    here = os.getcwd() + os.sep
    return [
        Path(argument).name
        if os.path.isabs(argument) and not argument.startswith(here)
        else argument.removeprefix(here)
        for argument in arguments
    ]
