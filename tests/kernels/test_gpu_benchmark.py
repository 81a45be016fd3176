"""The CPU-able part of the GPU suite: the benchmark's dry run, interpreted, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(command: list[str], out: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels", "tests"))
    extra = {"OUT": str(out), "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **extra}, capture_output=True, text=True)


def test_dry_run_passes_its_gates_and_says_which_peers_are_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = run([sys.executable, "benchmarks/attention_gpu.py", "--dry-run"], tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "attention_gpu_dry_run.json").read_text())
    assert set(record["gate"]["checks"]) >= {"prefill", "sparse", "select", "decode", "sparse decode"}
    assert record["gate"]["passed"]
    results = record["results"]
    assert results["failures"] == {}
    assert {row["section"] for row in results["rows"]} >= {"ceilings", "dense", "sparse", "decode", "peer"}
    timed = {row["peer"] for row in results["rows"] if row["section"] == "peer"}
    assert timed | set(results["absent"]) == {"flex_attention", "flashinfer", "fla_moba", "fla_nsa"}
    assert "flex_attention" in timed
    assert all(results["absent"].values())


@pytest.mark.slow
def test_gpu_suite_dry_run_passes(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run(["bash", "scripts/gpu_suite.sh", "--dry-run"], tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "all passed" in done.stdout
