"""What the engine itself costs around a model step: schedulers, pool, codec, router. No model is computed.

    python -m pytest benchmarks/engine.py --benchmark-only [--benchmark-autosave | --benchmark-compare]

`tests/engine/test_overhead.py` holds the sum per decode step to a share of the step, so that it cannot creep.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from engine_operations import operations


@pytest.mark.parametrize("name", list(operations()))
def test_operation(benchmark: BenchmarkFixture, name: str) -> None:
    """One operation, as often as pytest-benchmark finds useful."""
    benchmark(operations()[name])
