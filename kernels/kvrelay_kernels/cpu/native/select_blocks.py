"""C++ ``select_blocks`` for ``tree``, the default, and ``two_stage`` (``csrc/tree_selection.h``).

The other selectors it is compared with stay in batched torch here too.
"""

from torch import Tensor

from kvrelay_kernels.cpu.batched.select_blocks import select_blocks as select_blocks_in_torch
from kvrelay_kernels.cpu.native.arguments import Argument, lists, paged, queries, raise_for, statistics
from kvrelay_kernels.cpu.native.library import TreeConfigStruct, library
from kvrelay_kernels.errors import InvalidArgument
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.reference.select_blocks import empty_selection
from kvrelay_kernels.selection import BlockSelection, SelectionConfig
from kvrelay_kernels.stats import KVBlockStats

IN_CPP = ("tree", "two_stage")
EVERY_PAGE = 2**31 - 1  # a beam so wide that the walk starts at the pages


def select_blocks(
    q: Tensor,
    kv: PagedKV,
    config: SelectionConfig,
    cu_seqlens_q: Tensor | None,
    stats: KVBlockStats | None,
    scale: float,
    to: Argument | None = None,
) -> BlockSelection:
    """See ``kvrelay_kernels.api.select_blocks``; attention over the lists goes ``to`` outputs, if given."""
    if config.selector not in IN_CPP:
        return select_blocks_in_torch(q, kv, config, cu_seqlens_q, stats, scale)
    if stats is None:
        raise InvalidArgument("stats", needed="KVBlockStats of these pages for this selector", got=None)
    selection = empty_selection(q, kv, config, cu_seqlens_q)
    rows, settings = queries(q, cu_seqlens_q, scale), tree_settings(config)
    parts = (paged(kv), rows, statistics(stats), settings, lists(selection))
    status = library().kvr_select_tree(*(part.pointer for part in parts), None if to is None else to.pointer)
    raise_for(status, kv, q, cu_seqlens_q)
    return selection


def tree_settings(config: SelectionConfig) -> Argument:
    """``TreeConfig``."""
    struct = TreeConfigStruct(
        budget=config.budget,
        sink_blocks=config.sink_blocks,
        local_blocks=config.local_blocks,
        num_candidates=config.num_candidates,
        beam=config.beam if config.selector == "tree" else EVERY_PAGE,
        sampled_queries=config.sampled_queries,
        sibling_blocks=config.sibling_blocks,
        by_peak=config.by_peak,
        top_p=2.0 if config.top_p is None else config.top_p,
    )
    return Argument(struct, ())
