"""Operation ``sparse_prefill``: selection of blocks, and a chunk's causal attention over them."""

from torch import Tensor

from kvrelay_kernels.api.attention import softmax_scale
from kvrelay_kernels.api.block_sparse_prefill import block_sparse_prefill
from kvrelay_kernels.api.select_blocks import select_blocks
from kvrelay_kernels.cpu.native.sparse_prefill import ranks_what_it_reads
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

    In one pass over the keys where that can be (``cpu-native``, ``tree``, a list for each query head, ranked
    by all 64 rows of a block): the logits that rank are then those that attention needs.

    Arguments and errors as of the two. Returns ``(out, lse, selection)``; ``out`` and ``lse`` may differ from
    those of the two by rounding, from one of these ways to the other.
    """
    check_queries(q, kv, cu_seqlens_q)
    if resolve("select_blocks", impl, q) == "cpu-native" and ranks_what_it_reads(q, kv, config):
        if stats is not None:
            stats.check(kv)
        kernel = implementation("sparse_prefill", "cpu-native", q)
        out, lse, selection = kernel(q, kv, cu_seqlens_q, config, stats, softmax_scale(scale, kv))
        return out, lse, selection
    selection = select_blocks(q, kv, config, cu_seqlens_q=cu_seqlens_q, stats=stats, scale=scale, impl=impl)
    return *block_sparse_prefill(q, kv, cu_seqlens_q, selection, scale=scale, impl=impl), selection
