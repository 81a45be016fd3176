"""What the engine itself costs around a model step: schedulers, sampling, pool, codec, router. No model runs.

    python benchmarks/engine.py                  measures and writes benchmarks/results/engine.json
    python -m pytest benchmarks/engine.py --benchmark-only [--benchmark-autosave | --benchmark-compare]

`tests/engine/test_overhead.py` holds the sum per decode step to a share of the step, so that it cannot creep.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvrelay.experiments.record import Gate, make_record, write_record

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from engine_operations import operations


@pytest.mark.parametrize("name", list(operations()))
def test_operation(benchmark: BenchmarkFixture, name: str) -> None:
    """One operation, as often as pytest-benchmark finds useful."""
    benchmark(operations()[name])


def main() -> None:
    """Have pytest measure, and record each operation's median, its least and how often it ran."""
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "found.json"
        ended = pytest.main([__file__, "--benchmark-only", f"--benchmark-json={found}", "-q"])
        measured = json.loads(found.read_text())["benchmarks"] if found.exists() else []
    results = {
        row["params"]["name"]: {
            "median_us": row["stats"]["median"] * 1e6,
            "min_us": row["stats"]["min"] * 1e6,
            "rounds": row["stats"]["rounds"],
        }
        for row in measured
    }
    checks = {"every operation ran": ended == pytest.ExitCode.OK and set(results) == set(operations())}
    record = make_record("engine", {}, Gate(checks=checks), results)
    write_record(record, Path(__file__).parent / "results" / "engine.json")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
