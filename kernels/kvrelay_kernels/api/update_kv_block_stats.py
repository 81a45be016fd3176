"""Operation ``update_kv_block_stats``: keeps statistics up to date as tokens are appended."""

from torch import Tensor

from kvrelay_kernels.checks import check_int32, check_same, check_shape
from kvrelay_kernels.dispatch import implementation
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.stats import KVBlockStats


def update_kv_block_stats(
    stats: KVBlockStats, kv: PagedKV, num_new_tokens: Tensor, *, impl: str = "auto"
) -> None:
    """Write, in place, the statistics of the pages that the last ``num_new_tokens [batch]`` int32 tokens
    filled.

    ``kv`` already holds those tokens. A page is read once, when it is full, and then merges at most one
    tree node of four children: constant work per appended token. Raises InvalidArgument and
    KernelUnavailable.
    """
    stats.check(kv)
    check_shape("num_new_tokens", num_new_tokens, (kv.batch,))
    check_int32("num_new_tokens", num_new_tokens)
    check_same("num_new_tokens", num_new_tokens, "k_pages", kv.k_pages, dtype=False)
    implementation("update_kv_block_stats", impl, kv.k_pages)(stats, kv, num_new_tokens)
