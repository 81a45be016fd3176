"""``benchmarks/selection.py --quick`` meets its bars on a short text and leaves a whole record."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.usefixtures("benchmark_path")
def test_quick_run_meets_the_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from real_model import NAME, smollm2_directory
    from selection import main

    smollm2_directory()
    monkeypatch.setattr(sys, "argv", ["selection.py", "--quick"])
    text = BENCHMARKS / "texts" / "python_source.txt"
    assert main(["--quick", "--model", NAME, "--out", str(tmp_path), str(text)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "selection.json").read_text())
    assert record["name"] == "selection"
    assert record["gate"]["passed"]
    closed = {row["selector"]: row["gap_closed"] for row in record["results"]["quality"]}
    assert closed["oracle"] == pytest.approx(1.0)
    assert 0.93 <= closed["tree"] <= 1.0
    assert closed["mean_pool"] < closed["tree"]
    assert all(row["share"] <= 0.1 for row in record["results"]["operations"])
    assert all(row["tree"] == 1.0 for row in record["results"]["needles"])


@pytest.mark.usefixtures("benchmark_path")
def test_operations_are_those_of_the_products_that_ran() -> None:
    import torch

    from selection_operations import counted

    left, right = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    assert counted(lambda: left @ right) == 2 * 2 * 3 * 4 * 5
    assert counted(lambda: (left * 2).sum()) == 24 + 24
    assert counted(lambda: torch.arange(10) * 3) == 0
