"""Triton implementation of ``select_blocks``: finds the selector's launcher; no value reaches the host."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor

from kvrelay_kernels.errors import KernelUnavailable
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection, SelectionConfig
from kvrelay_kernels.selectors import SELECTORS, selector_location
from kvrelay_kernels.stats import KVBlockStats
from kvrelay_kernels.triton.arguments import check_supported
from kvrelay_kernels.triton.select_request import SelectRequest, select_request


def select_blocks(
    q: Tensor,
    kv: PagedKV,
    config: SelectionConfig,
    cu_seqlens_q: Tensor | None,
    stats: KVBlockStats | None,
    scale: float,
) -> BlockSelection:
    """See ``kvrelay_kernels.api.select_blocks``."""
    check_supported("select_blocks", q)
    launcher = _launcher(config.selector)
    if launcher is None:
        existing = [name for name in SELECTORS if _launcher(name) is not None]
        reason = f"selector {config.selector!r} has no triton kernel; those that have: {existing}"
        raise KernelUnavailable(f"select_blocks: {reason}")
    request = select_request(q, kv, config, cu_seqlens_q, stats, scale)
    launcher(request)
    return BlockSelection(indices=request.indices, counts=request.counts, cu_q_blocks=request.cu_q_blocks)


def _launcher(selector: str) -> Callable[[SelectRequest], None] | None:
    module, function = selector_location(selector)
    if find_spec(f"kvrelay_kernels.triton.{module}") is None:
        return None
    launcher: Callable[[SelectRequest], None] | None = getattr(
        import_module(f"kvrelay_kernels.triton.{module}"), function, None
    )
    return launcher
