"""Compiles every Triton kernel for GPUs that are not there and holds what the compiler made of it to a line.

The library's own host code is run under a stand-in driver that compiles each launch for the wanted target and
launches nothing, so what is judged is what a GPU would run. ``python -m kvrelay_kernels.compile_gate`` prints
the table and fails when a kernel spills, uses a stack, overflows shared memory or misses ``wgmma``.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection, SelectionConfig
from kvrelay_kernels.stats import KVBlockStats
from kvrelay_kernels.triton.block_sparse_decode import block_sparse_decode
from kvrelay_kernels.triton.block_sparse_prefill import block_sparse_prefill
from kvrelay_kernels.triton.kv_block_stats import kv_block_stats
from kvrelay_kernels.triton.merge_attention_states import merge_attention_states
from kvrelay_kernels.triton.paged_decode import paged_decode
from kvrelay_kernels.triton.paged_prefill import paged_prefill
from kvrelay_kernels.triton.select_blocks import select_blocks

ARCHITECTURES = (80, 90, 100)
MAX_SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Opt-in shared memory of one block (CUDA C++ programming guide, compute capabilities)."""
MAX_STACK_BYTES = {80: 96, 90: 0, 100: 0}
"""sm_80 keeps query fragments in registers and spills a few bytes outside the loop; elsewhere, nothing."""
WGMMA_KERNELS = ("tiled_prefill",)
SELECTORS = ("tree", "two_stage", "quest", "mean_pool", "local")


@dataclass(frozen=True, slots=True, kw_only=True)
class GateShape:
    """Shape that is compiled for: heads, channels, dtype, and the selection's budget in blocks."""

    group: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    kv_heads: int = 2
    budget: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """What the compiler made of one launch. Registers are per thread, shared memory is per block."""

    operation: str
    kernel: str
    architecture: int
    shape: GateShape
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    wgmma: bool

    def complaints(self) -> list[str]:
        """Why this kernel does not pass; empty if it does."""
        found = []
        stack = MAX_STACK_BYTES[self.architecture]
        if self.stack_bytes > stack:
            found.append(f"needed at most {stack} bytes of stack (spills), got {self.stack_bytes}")
        limit = min(255, 65536 // (32 * self.num_warps))
        if self.registers > limit:
            found.append(f"needed at most {limit} registers, got {self.registers}")
        if self.shared_bytes > MAX_SHARED_BYTES[self.architecture]:
            needed = MAX_SHARED_BYTES[self.architecture]
            found.append(f"needed at most {needed} bytes of shared memory, got {self.shared_bytes}")
        if self.architecture == 90 and self.kernel in WGMMA_KERNELS and not self.wgmma:
            found.append("needed wgmma, got none")
        return found


class _AbsentGPU:
    """Just enough of a Triton driver to compile for ``target``."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # Triton caches kernels by device

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def recorded_compilations(architecture: int) -> Iterator[list[Any]]:
    """Within it, launching a kernel compiles it for ``architecture`` and appends it to the list."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    before = dict(driver.__dict__)
    JITFunction.run = compile_only
    driver.set_active(_AbsentGPU(architecture))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver.__dict__.update(before)


def operations(shape: GateShape) -> dict[str, Callable[[], object]]:
    """A call of every operation on a small batch of ``shape``; nothing of it is computed."""
    heads = shape.kv_heads * shape.group
    pages = torch.empty(32, shape.kv_heads, 64, shape.head_dim, dtype=shape.dtype)
    kv = PagedKV(
        k_pages=pages,
        v_pages=torch.empty_like(pages),
        block_table=torch.zeros(2, 4096, dtype=torch.int32),
        seq_lens=torch.zeros(2, dtype=torch.int32),
    )
    q = torch.empty(256, heads, shape.head_dim, dtype=shape.dtype)
    cu_seqlens_q = torch.zeros(3, dtype=torch.int32)
    stats = KVBlockStats.empty(pages)
    lists = {rows: _selection(rows, shape) for rows in (2, (256 + 126) // 64)}
    parts = torch.empty(4, 2, heads, shape.head_dim)

    def select(name: str, cu: Tensor | None) -> BlockSelection:
        config = SelectionConfig(budget=shape.budget, selector=name)
        return select_blocks(q if cu is not None else q[:2], kv, config, cu, stats, 0.1)

    def select_exactly() -> BlockSelection:
        config = SelectionConfig(budget=shape.budget, sampled_queries=64, by_peak=True, top_p=0.98)
        return select_blocks(q[:, :: shape.group], kv, config, cu_seqlens_q, stats, 0.1)

    calls: dict[str, Callable[[], object]] = {
        "paged_prefill": lambda: paged_prefill(q, kv, cu_seqlens_q, 0.1),
        "block_sparse_prefill": lambda: block_sparse_prefill(q, kv, cu_seqlens_q, lists[5], 0.1),
        "paged_decode": lambda: paged_decode(q[:2], kv, 0.1),
        "block_sparse_decode": lambda: block_sparse_decode(q[:2], kv, lists[2], 0.1),
        "merge_attention_states": lambda: merge_attention_states(parts, parts[..., 0].contiguous()),
        "kv_block_stats": lambda: kv_block_stats(kv),
        "select_blocks tree exact": select_exactly,
    }
    for name in SELECTORS:
        calls[f"select_blocks {name} prefill"] = partial(select, name, cu_seqlens_q)
        calls[f"select_blocks {name} decode"] = partial(select, name, None)
    return calls


def _selection(slots: int, shape: GateShape) -> BlockSelection:
    return BlockSelection(
        indices=torch.zeros(slots, shape.kv_heads, shape.budget, dtype=torch.int32),
        counts=torch.zeros(slots, shape.kv_heads, dtype=torch.int32),
        cu_q_blocks=torch.zeros(3, dtype=torch.int32),
    )


def compile_operation(operation: str, architecture: int, shape: GateShape) -> list[CompiledKernel]:
    """Compile every kernel that ``operation`` launches."""
    with recorded_compilations(architecture) as compiled:
        operations(shape)[operation]()
    return [_judged(kernel, operation, architecture, shape) for kernel in compiled]


def _judged(kernel: Any, operation: str, architecture: int, shape: GateShape) -> CompiledKernel:
    usage = _resource_usage(kernel.asm["cubin"])
    return CompiledKernel(
        operation=operation,
        kernel=kernel.metadata.name.lstrip("_"),
        architecture=architecture,
        shape=shape,
        num_warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        wgmma="wgmma.mma_async" in kernel.asm["ptx"],
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL as ``cuobjdump --dump-resource-usage`` states them."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", printed)}


HEADER = (
    f"{'operation':32}{'kernel':24}{'sm':>4}{'G':>4}{'d':>5}"
    f"{'warps':>6}{'regs':>6}{'stack':>6}{'shared':>8} wgmma"
)


def row(kernel: CompiledKernel) -> str:
    """One line of the table under ``HEADER``."""
    return (
        f"{kernel.operation:32}{kernel.kernel:24}{kernel.architecture:>4}{kernel.shape.group:>4}"
        f"{kernel.shape.head_dim:>5}{kernel.num_warps:>6}{kernel.registers:>6}{kernel.stack_bytes:>6}"
        f"{kernel.shared_bytes:>8} {'yes' if kernel.wgmma else '-':5} {'; '.join(kernel.complaints())}"
    )


def served_shapes() -> list[GateShape]:
    """The shapes that are served: head_dim 64 and 128, groups 1, 4 and 8, bf16."""
    return [GateShape(group=group, head_dim=head_dim) for head_dim in (64, 128) for group in (1, 4, 8)]


def main() -> int:
    """Print the table; the exit status is 1 if any kernel does not pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sm", type=int, nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--group", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--head-dim", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--operation", default="", help="only operations whose name contains this")
    arguments = parser.parse_args()
    print(HEADER)
    failed = 0
    for architecture in arguments.sm:
        for head_dim in arguments.head_dim:
            for group in arguments.group:
                shape = GateShape(group=group, head_dim=head_dim)
                for operation in operations(shape):
                    if arguments.operation in operation:
                        kernels = compile_operation(operation, architecture, shape)
                        failed += sum(bool(kernel.complaints()) for kernel in kernels)
                        print(*map(row, kernels), sep="\n", flush=True)
    print(f"{failed} kernels fail the gate")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
