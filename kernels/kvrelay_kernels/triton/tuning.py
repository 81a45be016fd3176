"""Tile shapes, warps and stages of every kernel: the only place where they are chosen.

Small tables by (head_dim, compute capability), set from register and shared-memory counts of the compile
gate and meant to be replaced by measurements; there is no autotuner, so the first call costs one compile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

INTERPRETED_PROGRAMS = 3
"""Persistent programs where there is no GPU to count: few, so that each takes several work items."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Warps, stages and, if the compiler needs one, the register limit of one kernel launch."""

    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def options(self) -> dict[str, int]:
        """Keyword arguments of a Triton launch."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


def next_power_of_2(number: int) -> int:
    """Smallest power of two at or above ``number`` (at least 1)."""
    return 1 << max(number - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Channels of a tile: Triton tiles are powers of two, and ``tl.dot`` needs at least 16."""
    return max(16, next_power_of_2(head_dim))


def heads_per_tile(group: int, q: Tensor) -> int:
    """Query heads that share a prefill tile of 64 queries: two (128 rows) where they divide the group."""
    wide = q.element_size() > 2 or q.shape[2] > 128
    return 2 if group % 2 == 0 and not wide else 1


def prefill_launch(q: Tensor, rows: int) -> Launch:
    """Launch of a prefill tile of ``rows`` rows."""
    if q.element_size() > 2:
        return Launch(num_warps=4, num_stages=1)
    if q.shape[2] > 128:
        return Launch(num_warps=8, num_stages=1 if compute_capability() < 90 else 2)
    if compute_capability() < 90:
        return Launch(num_warps=8, num_stages=2)
    return Launch(num_warps=8 if rows > 64 else 4, num_stages=3)


def decode_launch(q: Tensor) -> Launch:
    """Launch of one split of a decode: bound by reading KV, so deep rather than wide."""
    if q.element_size() > 2 or q.shape[2] > 128:
        return Launch(num_warps=4, num_stages=2 if q.element_size() == 2 else 1)
    return Launch(num_warps=4, num_stages=3)


def scan_launch(q: Tensor) -> Launch:
    """Launch of a selector's scan of boxes: registers for two programs of 8 warps a processor, or three of 4
    at 64 channels, where the first would spill."""
    stages = 1 if q.element_size() > 2 else 2
    if q.shape[2] <= 64:
        return Launch(num_warps=4, num_stages=stages, max_registers=168)
    return Launch(num_warps=8, num_stages=stages, max_registers=128)


def rerank_launch(q: Tensor) -> Launch:
    """Launch of the exact rerank: bound by reading K. Unless told, ptxas spills to stay at 168 registers."""
    small = q.element_size() == 2 and q.shape[2] <= 128
    return Launch(num_warps=4, num_stages=2 if small else 1, max_registers=255)


def num_splits(rows: int, max_blocks: int, q: Tensor) -> int:
    """Programs that share one decode row, from sizes the host knows: about four per processor in all.

    rows: ``batch * num_kv_heads``. max_blocks: the most KV blocks a row can have.
    """
    wanted = -(-4 * num_processors(q) // max(rows, 1))
    return max(1, min(wanted, max_blocks, 128))


def num_persistent(work: int, scratch_bytes: int, q: Tensor) -> int:
    """Persistent programs for ``work`` items, each with ``scratch_bytes``: at most 256 MiB of scratch."""
    fitting = max(1, (256 << 20) // max(scratch_bytes, 1))
    wanted = 4 * num_processors(q) if q.is_cuda else INTERPRETED_PROGRAMS
    return max(1, min(work, wanted, fitting))


def num_processors(q: Tensor) -> int:
    """Streaming multiprocessors of the tensor's device; where there is none, enough for a few splits."""
    if not q.is_cuda:
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(q.device).multi_processor_count


def compute_capability() -> int:
    """Major and minor version as one number, such as 90: of the device, or of the compile gate's target."""
    if knobs.runtime.interpret:
        return 0
    return int(driver.active.get_current_target().arch)
