"""Operation ``sparse_prefill``: selection of blocks, and a chunk's causal attention over them."""

from torch import Tensor

from kvrelay_kernels.api.attention import softmax_scale
from kvrelay_kernels.api.block_sparse_prefill import block_sparse_prefill
from kvrelay_kernels.api.select_blocks import select_blocks
from kvrelay_kernels.cpu.native.select_and_attend import ranks_what_it_reads, select_and_attend
from kvrelay_kernels.dispatch import implementation, resolve
from kvrelay_kernels.layout import PagedKV, check_queries
from kvrelay_kernels.selection import BlockSelection, SelectionConfig
from kvrelay_kernels.stats import KVBlockStats


def sparse_prefill(
    q: Tensor,
    kv: PagedKV,
    cu_seqlens_q: Tensor,
    config: SelectionConfig,
    *,
    stats: KVBlockStats | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, BlockSelection]:
    """``select_blocks``, then ``block_sparse_prefill`` over what was selected.

    Where ``tree`` or ``two_stage`` ranks lists by all 64 rows of a block, each for a single query head
    (``cpu-native``), their logits are computed once for both.

    Arguments, errors and implementations as of the two. Returns ``(out, lse, selection)``.
    """
    check_queries(q, kv, cu_seqlens_q)
    if resolve("select_blocks", impl, q) == "cpu-native" and ranks_what_it_reads(q, kv, config):
        implementation("select_blocks", impl, q)  # raises where it cannot run
        if stats is not None:
            stats.check(kv)
        return select_and_attend(q, kv, cu_seqlens_q, config, stats, softmax_scale(scale, kv))
    selection = select_blocks(q, kv, config, cu_seqlens_q=cu_seqlens_q, stats=stats, scale=scale, impl=impl)
    return *block_sparse_prefill(q, kv, cu_seqlens_q, selection, scale=scale, impl=impl), selection
