"""The engine's work around a decode step stays a small share of it, and grows no faster than the batch."""

import time
from collections.abc import Iterator

import pytest
import torch

from engine_operations import Operation, codec_cycle, operations, router_step, sampling, scheduler_step

SHARE = 0.05  # of the fastest step possible at batch 16
NUM_WEIGHTS = 134.5e6  # SmolLM2-135M, the smallest model we claim to serve fast
WEIGHT_BYTES = 2 * NUM_WEIGHTS  # in bfloat16


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fastest(operation: Operation, seconds: float = 0.3) -> float:
    """Seconds of the least disturbed of many calls."""
    operation()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        operation()
        best = min(best, time.perf_counter() - start)
    return best


def around_a_step() -> dict[str, float]:
    """Seconds of what the engine does between two steps of 16 sequences, sampling apart."""
    return {
        "scheduler": fastest(scheduler_step(16)),
        "codec": fastest(codec_cycle(16)),
        "router": fastest(router_step(16)),
    }


def test_a_step_of_16_spends_at_most_a_twentieth_of_its_floor_outside_the_model() -> None:
    memory = torch.ones(64 * 2**20, dtype=torch.uint8).view(torch.int64)
    floor_s = fastest(memory.sum) / memory.nbytes * WEIGHT_BYTES  # decode cannot beat reading its weights
    parts = around_a_step()
    assert sum(parts.values()) <= SHARE * floor_s, f"{parts} of a step of at least {floor_s:.4f} s"


@pytest.mark.usefixtures("one_thread")
def test_with_sampling_it_is_at_most_a_tenth_of_the_multiplications() -> None:
    """Sampling grows with the rows, as multiplications do and reading does not; both on one thread.

    A tenth here, as no step is multiplications alone: its real share is in the record of decode_step.py.
    """
    x, weights = torch.randn(16, 576), torch.randn(1536, 576)  # a layer's, small enough for the caches
    floor_s = fastest(lambda: x @ weights.T) / weights.numel() * NUM_WEIGHTS
    parts = {**around_a_step(), "sampling": fastest(sampling(16))}
    assert sum(parts.values()) <= 2 * SHARE * floor_s, f"{parts} of a step of at least {floor_s:.4f} s"


def test_a_scheduler_step_grows_no_faster_than_its_sequences() -> None:
    small, large = fastest(scheduler_step(50)), fastest(scheduler_step(1000))
    assert large <= 2 * 20 * small, f"{small:.6f} s for 50 sequences, {large:.6f} s for 1000"


@pytest.mark.parametrize("name", list(operations()))
def test_every_benchmarked_operation_can_be_repeated(name: str) -> None:
    operation = operations()[name]
    for _ in range(3):
        operation()
