"""Small cases under pytest-benchmark, for comparing two commits: ``pytest --benchmark-only``."""

from collections.abc import Callable

import pytest
import torch

import kvrelay_kernels as kk
from kernel_batches import make_batch

pytest.importorskip("pytest_benchmark")


def cases(impl: str) -> dict[str, Callable[[], object]]:
    """Each operation on one sequence of 2,048 tokens, 8 query and 2 KV heads."""
    batch = make_batch([(0, 2048)], heads=(8, 2), dtype=torch.float32)
    kv, bounds, config = batch.kv, batch.cu_seqlens_q, kk.SelectionConfig(budget=8)
    stats = kk.kv_block_stats(kv, impl=impl)
    chosen = kk.select_blocks(batch.q, kv, config, cu_seqlens_q=bounds, stats=stats, impl=impl)
    last = batch.q[-1:]
    one = kk.select_blocks(last, kv, config, stats=stats, impl=impl)
    return {
        "kv_block_stats": lambda: kk.kv_block_stats(kv, impl=impl),
        "select_blocks": lambda: kk.select_blocks(
            batch.q, kv, config, cu_seqlens_q=bounds, stats=stats, impl=impl
        ),
        "paged_prefill": lambda: kk.paged_prefill(batch.q, kv, bounds, impl=impl),
        "block_sparse_prefill": lambda: kk.block_sparse_prefill(batch.q, kv, bounds, chosen, impl=impl),
        "paged_decode": lambda: kk.paged_decode(last, kv, impl=impl),
        "block_sparse_decode": lambda: kk.block_sparse_decode(last, kv, one, impl=impl),
    }


OPERATIONS = (
    "kv_block_stats",
    "select_blocks",
    "paged_prefill",
    "block_sparse_prefill",
    "paged_decode",
    "block_sparse_decode",
)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", ["cpu-native", "cpu-torch"])
def test_small(benchmark, backend: str, operation: str) -> None:
    if backend == "cpu-native" and kk.cpu_backend() == "torch":
        pytest.skip("the C++ extension is not built")
    benchmark.pedantic(cases(backend)[operation], rounds=3, warmup_rounds=1)
