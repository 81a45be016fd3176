"""Triton kernels compiled ahead of time for absent GPUs: registers, stack, shared memory, wgmma."""

import warnings

import pytest
import torch

import kvrelay_kernels as kk
from kernel_batches import TRITON, make_batch

pytest.importorskip("triton")
if TRITON:
    pytest.skip("needs a process whose Triton compiles and has no GPU", allow_module_level=True)

from kvrelay_kernels.compile_gate import (
    ARCHITECTURES,
    HEADER,
    CompiledKernel,
    GateShape,
    compile_operation,
    operations,
    row,
    served_shapes,
)

WIDE = GateShape(group=4, head_dim=128)
SAMPLE = [
    (90, WIDE, ["paged_prefill", "block_sparse_prefill", "block_sparse_decode", "kv_block_stats"]),
    (90, WIDE, ["select_blocks tree prefill", "select_blocks tree decode", "select_blocks tree exact"]),
    (80, GateShape(group=1, head_dim=64), ["block_sparse_prefill"]),
    (100, GateShape(group=8, head_dim=128), ["block_sparse_prefill"]),
]


def check(architecture: int, shape: GateShape, names: list[str]) -> list[CompiledKernel]:
    """Compile, print the table, and fail on any complaint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernels = [kernel for name in names for kernel in compile_operation(name, architecture, shape)]
    print(HEADER, *map(row, kernels), sep="\n")
    assert [row(kernel) for kernel in kernels if kernel.complaints()] == []
    return kernels


@pytest.mark.parametrize(("architecture", "shape", "names"), SAMPLE)
def test_sampled_kernels_pass_the_gate(architecture: int, shape: GateShape, names: list[str]) -> None:
    assert check(architecture, shape, names)


@pytest.mark.slow
@pytest.mark.parametrize("shape", served_shapes(), ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_passes_the_gate(architecture: int, shape: GateShape) -> None:
    check(architecture, shape, list(operations(shape)))


@pytest.mark.slow
@pytest.mark.parametrize(("group", "head_dim"), [(16, 64), (3, 96), (5, 128), (2, 256)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_odd_shapes_compile(group: int, head_dim: int, dtype: torch.dtype) -> None:
    shape = GateShape(group=group, head_dim=head_dim, dtype=dtype)
    for name in operations(shape):
        for kernel in compile_operation(name, 90, shape):
            assert kernel.shared_bytes <= 227 << 10, row(kernel)


def test_gate_complains_about_each_thing_it_holds() -> None:
    good = CompiledKernel(
        operation="paged_prefill",
        kernel="tiled_prefill",
        architecture=90,
        shape=WIDE,
        num_warps=8,
        registers=178,
        stack_bytes=0,
        shared_bytes=1,
        wgmma=True,
    )
    assert good.complaints() == []
    bad = {"stack_bytes": 8, "registers": 256, "shared_bytes": 1 << 20, "wgmma": False}
    fields = {name: getattr(good, name) for name in CompiledKernel.__slots__}
    for name, value in bad.items():
        assert len(CompiledKernel(**{**fields, name: value}).complaints()) == 1


def test_triton_on_cpu_tensors_and_missing_kernels_say_why() -> None:
    batch = make_batch([(0, 70)], dtype=torch.float32)
    with pytest.raises(kk.KernelUnavailable, match="tensors are on cpu, needed cuda"):
        kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl="triton")
    from kvrelay_kernels.triton.select_blocks import select_blocks

    config = kk.SelectionConfig(budget=4, selector="oracle")
    with pytest.raises(kk.KernelUnavailable, match=r"those that have: \['local', 'mean_pool', 'quest', 'two"):
        select_blocks(batch.q, batch.kv, config, batch.cu_seqlens_q, None, 1.0)
    with pytest.raises(kk.KernelUnavailable, match=r"got torch\.float64"):
        select_blocks(batch.q.double(), batch.kv, config, batch.cu_seqlens_q, None, 1.0)
