"""What selection costs: operations counted while the reference runs, not by formula.

A long sequence is stood in for by statistics of its pages and one page of keys seen everywhere, so 12M tokens
need no 12M keys: what the walk and the rerank compute depends on how many nodes and pages there are, not on
what they hold.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvrelay_kernels import (
    BLOCK_SIZE,
    KVBlockStats,
    PagedKV,
    SelectionConfig,
    select_blocks,
    update_kv_block_stats,
)

NUM_Q_HEADS, HEAD_DIM = 3, 64  # one KV head of SmolLM2-135M; shares do not depend on the number of KV heads

_MATMULS = ("mm", "bmm")
_PER_OUTPUT = ("add", "sub", "mul", "div", "exp", "sqrt", "pow", "square", "clamp", "reciprocal")
_PER_INPUT = {
    "sum": 1,
    "mean": 1,
    "amin": 1,
    "amax": 1,
    "cumsum": 1,
    "topk": 1,
    "_softmax": 4,
    "logsumexp": 4,
}


class OperationCounter(TorchDispatchMode):
    """Counts floating-point operations of everything torch runs inside: 2 per multiply-add of a product, 1
    per element of arithmetic and of a reduction, 4 per element of softmax and logsumexp, 1 per element of
    topk, log2(n) per element of a sort. Copies, gathers, comparisons and index arithmetic are free."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = next((each for each in args if isinstance(each, Tensor)), None)
        if first is not None and first.is_floating_point():
            self.operations += _count(func.overloadpacket.__name__, first, args, result)
        return result


def _count(name: str, first: Tensor, args: Any, result: Any) -> int:
    if name in _MATMULS:
        return 2 * result.numel() * first.shape[-1]
    if name.rstrip("_") in _PER_OUTPUT:
        return int(result.numel())
    if name == "sort":
        return math.ceil(first.numel() * math.log2(max(first.shape[-1], 2)))
    return _PER_INPUT.get(name, 0) * first.numel()


def counted(run: Callable[[], Any]) -> int:
    """Operations of ``run()``."""
    with OperationCounter() as counter:
        run()
    return counter.operations


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionOperations:
    """Operations of a whole causal prefill of ``num_tokens`` by one KV head and its query heads.

    selection includes statistics. attention: 4 * head_dim per attended pair, counted from the lists; its
    softmax is not counted, which makes the share an upper bound. ``exact``: every sibling group was run;
    otherwise groups at the middles of equal strata stand for their strata. last_group: selection for the
    last sibling group alone, always run: the cost of ``config.sibling_blocks`` query blocks at the end.
    groups: sibling groups of the prefill; statistics: the part of selection that builds them.
    """

    num_tokens: int
    groups: int
    statistics: int
    selection: int
    attention: int
    last_group: int
    exact: bool

    @property
    def share(self) -> float:
        return self.selection / self.attention


def selection_operations(num_tokens: int, config: SelectionConfig, max_groups: int) -> SelectionOperations:
    """Count over the sibling groups of a prefill, at most ``max_groups`` of them run."""
    width = config.sibling_blocks * BLOCK_SIZE
    groups = num_tokens // width
    picks = min(groups, max_groups)
    index = synthetic_index(num_tokens)
    selection = attention = 0
    for pick in range(picks):
        stop = ((2 * pick + 1) * groups // (2 * picks) + 1) * width
        operations, pairs = _group_operations(index, stop, width, config)
        selection += operations
        attention += pairs * 4 * HEAD_DIM * NUM_Q_HEADS
    statistics = round(statistics_per_token() * num_tokens)
    return SelectionOperations(
        num_tokens=num_tokens,
        groups=groups,
        statistics=statistics,
        selection=selection * groups // picks + statistics,
        attention=attention * groups // picks,
        last_group=_group_operations(index, groups * width, width, config)[0],
        exact=picks == groups,
    )


def synthetic_index(num_tokens: int) -> tuple[Tensor, KVBlockStats]:
    """One page of keys stood in for all (stride 0) and random statistics for each page."""
    pages = num_tokens // BLOCK_SIZE
    generator = torch.Generator().manual_seed(0)
    k_pages = torch.randn(1, 1, BLOCK_SIZE, HEAD_DIM, generator=generator).expand(pages, -1, -1, -1)
    centre, half = (torch.randn(pages, 1, HEAD_DIM, generator=generator) for _ in range(2))
    lower, upper = centre - half.abs(), centre + half.abs()
    stats = KVBlockStats(
        mean=centre,
        minimum=lower,
        maximum=upper,
        spread=half[..., 0],
        coarse_minimum=lower - 1,
        coarse_maximum=upper + 1,
    )
    return k_pages, stats


def _group_operations(
    index: tuple[Tensor, KVBlockStats], stop: int, width: int, config: SelectionConfig
) -> tuple[int, int]:
    """(operations, attended pairs) of the sibling group that ends at token ``stop``."""
    k_pages, stats = index
    lengths = torch.tensor([stop], dtype=torch.int32)
    table = torch.arange(len(k_pages), dtype=torch.int32)[None]
    kv = PagedKV(k_pages=k_pages, v_pages=k_pages, block_table=table, seq_lens=lengths)
    q = torch.randn(width, NUM_Q_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(stop))
    rows = torch.tensor([0, width], dtype=torch.int32)
    chosen = []
    operations = counted(
        lambda: chosen.append(select_blocks(q, kv, config, cu_seqlens_q=rows, stats=stats, impl="reference"))
    )
    return operations, chosen[0].attended_pairs(rows.diff(), lengths)


def statistics_per_token(num_tokens: int = 64 * 1024) -> float:
    """Operations of building statistics, per token of one KV head; constant in the length."""
    k_pages, stats = synthetic_index(num_tokens)
    table = torch.arange(len(k_pages), dtype=torch.int32)[None]
    lengths = torch.tensor([num_tokens], dtype=torch.int32)
    kv = PagedKV(k_pages=k_pages, v_pages=k_pages, block_table=table, seq_lens=lengths)
    return counted(lambda: update_kv_block_stats(stats, kv, lengths, impl="reference")) / num_tokens


def at_most_n_log_n(counts: list[SelectionOperations]) -> bool:
    """Whether selection grows at most as n log n, the measured lengths being 4-fold apart where they can be.

    Four times the pages are one more tree level, of which at most ``4 * (beam + 2)`` nodes are scored,
    however long the sequence is. So the cost of a group at the end of the sequence must rise by at most the
    same constant with every 4-fold step, ``cost(n) <= cost(n0) + step * log4(n / n0)``, and no group may
    cost more than the last one, which bounds the total by n times that. Only lengths exactly 4-fold apart are
    compared: between them the cost is a staircase. The total alone over ``n log n`` says nothing at small n:
    it rises while groups at the start of a sequence, with less than a full list to choose from, are many.
    """
    by_length = {each.num_tokens: each for each in counts}
    pairs = [(each, by_length[4 * n]) for n, each in sorted(by_length.items()) if 4 * n in by_length]
    steps = [later.last_group - earlier.last_group for earlier, later in pairs]
    within = all(each.selection - each.statistics <= each.groups * each.last_group for each in counts)
    return bool(steps) and max(steps) <= steps[0] and within
