"""C++ selection whose logits serve attention too (``csrc/tree_selection.h``): no operation of its own."""

from torch import Tensor

from kvrelay_kernels.cpu.native.arguments import outputs
from kvrelay_kernels.cpu.native.select_blocks import IN_CPP, select_blocks
from kvrelay_kernels.layout import BLOCK_SIZE, PagedKV
from kvrelay_kernels.selection import BlockSelection, SelectionConfig
from kvrelay_kernels.stats import KVBlockStats


def ranks_what_it_reads(q: Tensor, kv: PagedKV, config: SelectionConfig) -> bool:
    """Whether every row of a head ranks the blocks of that head's own list."""
    is_ranked_by_all = config.selector in IN_CPP and config.sampled_queries == BLOCK_SIZE
    return is_ranked_by_all and q.shape[1] == kv.num_kv_heads


def select_and_attend(
    q: Tensor,
    kv: PagedKV,
    cu_seqlens_q: Tensor,
    config: SelectionConfig,
    stats: KVBlockStats | None,
    scale: float,
) -> tuple[Tensor, Tensor, BlockSelection]:
    """``out``, ``lse`` and the lists of a prefill where ``ranks_what_it_reads``."""
    assert ranks_what_it_reads(q, kv, config)
    out, lse, to = outputs(q)
    return out, lse, select_blocks(q, kv, config, cu_seqlens_q, stats, scale, to)
