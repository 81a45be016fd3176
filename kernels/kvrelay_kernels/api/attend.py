"""``attend``: dense below a measured crossover, sparse above it, and says which it was."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from kvrelay_kernels.api.block_sparse_decode import block_sparse_decode
from kvrelay_kernels.api.paged_decode import paged_decode
from kvrelay_kernels.api.paged_prefill import paged_prefill
from kvrelay_kernels.api.select_blocks import select_blocks
from kvrelay_kernels.api.sparse_prefill import sparse_prefill
from kvrelay_kernels.dispatch import resolve
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection, SelectionConfig
from kvrelay_kernels.stats import KVBlockStats


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendPolicy:
    """When to be sparse. ``crossover_tokens`` comes from ``measure_crossover``; None is always dense.

    scale: multiplies q.k, default ``head_dim ** -0.5``.
    """

    selection: SelectionConfig
    crossover_tokens: int | None
    impl: str = "auto"
    scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """``out`` and ``lse`` as from ``paged_prefill``; path and implementation taken; the lists, if sparse."""

    out: Tensor
    lse: Tensor
    path: str
    impl: str
    selection: BlockSelection | None = None


def attend(
    q: Tensor,
    kv: PagedKV,
    cu_seqlens_q: Tensor | None,
    policy: AttendPolicy,
    *,
    max_seq_len: int,
    stats: KVBlockStats | None = None,
) -> Attended:
    """Attention of a batch, all dense or all sparse: prefill, or decode without ``cu_seqlens_q``.

    max_seq_len: largest of ``kv.seq_lens``, known to the host, so that choosing costs no synchronisation.
    Sparse from ``policy.crossover_tokens`` on. Other arguments and errors as in ``select_blocks``.
    """
    how: _How = {"impl": policy.impl, "scale": policy.scale}
    phase = "decode" if cu_seqlens_q is None else "prefill"
    if policy.crossover_tokens is None or max_seq_len < policy.crossover_tokens:
        if cu_seqlens_q is None:
            out, lse = paged_decode(q, kv, **how)
        else:
            out, lse = paged_prefill(q, kv, cu_seqlens_q, **how)
        return Attended(out=out, lse=lse, path="dense", impl=resolve(f"paged_{phase}", policy.impl, q))
    if cu_seqlens_q is None:
        chosen = select_blocks(q, kv, policy.selection, stats=stats, **how)
        out, lse = block_sparse_decode(q, kv, chosen, **how)
    else:
        out, lse, chosen = sparse_prefill(q, kv, cu_seqlens_q, policy.selection, stats=stats, **how)
    taken = resolve(f"block_sparse_{phase}", policy.impl, q)
    return Attended(out=out, lse=lse, path="sparse", impl=taken, selection=chosen)


class _How(TypedDict):
    impl: str
    scale: float | None


def measure_crossover(
    run_dense: Callable[[int], None], run_sparse: Callable[[int], None], lengths: list[int], repeats: int = 3
) -> int | None:
    """Smallest of ``lengths`` (tokens) from which sparse is faster at every longer one too; None if it
    never is.

    ``run_dense(n)`` and ``run_sparse(n)`` do the same work at ``n`` tokens, selection and statistics
    included, and are timed as the best of ``repeats`` after one warm-up.
    """
    crossover = None
    for length in sorted(lengths, reverse=True):
        if _best_s(run_sparse, length, repeats) >= _best_s(run_dense, length, repeats):
            break
        crossover = length
    return crossover


def _best_s(run: Callable[[int], None], length: int, repeats: int) -> float:
    run(length)
    times = []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        run(length)
        _synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
