"""Operation ``select_blocks``: which KV blocks each query block attends to."""

from torch import Tensor

from kvrelay_kernels.api.attention import softmax_scale
from kvrelay_kernels.dispatch import implementation
from kvrelay_kernels.layout import PagedKV, check_queries
from kvrelay_kernels.selection import BlockSelection, SelectionConfig
from kvrelay_kernels.selectors import selector_location
from kvrelay_kernels.stats import KVBlockStats


def select_blocks(
    q: Tensor,
    kv: PagedKV,
    config: SelectionConfig,
    *,
    cu_seqlens_q: Tensor | None = None,
    stats: KVBlockStats | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> BlockSelection:
    """Select at most ``config.budget`` blocks per (query block of 64 rows, KV head), shared by its query
    heads.

    q: ``[total_q, num_q_heads, head_dim]`` with ``cu_seqlens_q [batch + 1]`` int32 (prefill; chunk offsets
        are multiples of 64), or ``[batch, num_q_heads, head_dim]`` without (decode, one list per sequence).
    kv: paged cache, the queries' own tokens included. Only ``k_pages`` is read.
    stats: statistics of every complete page of ``kv`` (``kv_block_stats``); needed by ``mean_pool``,
        ``quest``, ``two_stage`` and ``tree``.

    Sinks, locals and the own block are always in the list. What is selected for a query block depends on the
    queries and keys up to the end of its sibling group (``config.sibling_blocks`` aligned blocks), not on
    later ones, not on the rest of the batch and not on where chunks are cut, if at multiples of the group.
    Raises InvalidArgument, UnknownName and KernelUnavailable. Method: see ``reference.select_blocks_tree``.
    """
    check_queries(q, kv, cu_seqlens_q)
    selector_location(config.selector)
    if stats is not None:
        stats.check(kv)
    kernel = implementation("select_blocks", impl, q)
    selection: BlockSelection = kernel(q, kv, config, cu_seqlens_q, stats, softmax_scale(scale, kv))
    return selection
