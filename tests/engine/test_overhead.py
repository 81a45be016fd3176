"""The engine's work around a decode step stays a small share of it, and grows no faster than the batch."""

import time

import pytest
import torch

from engine_operations import Operation, codec_cycle, operations, router_step, scheduler_step

SHARE = 0.05  # of the fastest step possible at batch 16: the weights read once
WEIGHT_BYTES = 269e6  # SmolLM2-135M in bfloat16, the smallest model we claim to serve fast


def fastest(operation: Operation, seconds: float = 0.3) -> float:
    """Seconds of the least disturbed of many calls."""
    operation()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        operation()
        best = min(best, time.perf_counter() - start)
    return best


def test_a_step_of_16_spends_at_most_a_twentieth_of_its_floor_outside_the_model() -> None:
    memory = torch.ones(64 * 2**20, dtype=torch.uint8).view(torch.int64)
    floor_s = fastest(memory.sum) / memory.nbytes * WEIGHT_BYTES  # decode cannot beat reading its weights
    parts = {
        "scheduler": fastest(scheduler_step(16)),
        "codec": fastest(codec_cycle(16)),
        "router": fastest(router_step(16)),
    }
    spent_s = sum(parts.values())
    assert spent_s <= SHARE * floor_s, f"{parts} of a step of at least {floor_s:.4f} s"


def test_a_scheduler_step_grows_no_faster_than_its_sequences() -> None:
    small, large = fastest(scheduler_step(50)), fastest(scheduler_step(1000))
    assert large <= 2 * 20 * small, f"{small:.6f} s for 50 sequences, {large:.6f} s for 1000"


@pytest.mark.parametrize("name", list(operations()))
def test_every_benchmarked_operation_can_be_repeated(name: str) -> None:
    operation = operations()[name]
    for _ in range(3):
        operation()
