"""How keys, values and query blocks lie in memory: the page, the paged cache, the tree over pages.

Knows shapes and addresses. Knows nothing of attention or selection.
"""

from dataclasses import dataclass

from torch import Tensor

from kvrelay_kernels.checks import check_floating, check_int32, check_same, check_shape
from kvrelay_kernels.errors import InvalidArgument

BLOCK_SIZE = 64
"""Tokens in a KV page, which is also a query block, a selection leaf and a transfer unit."""

FANOUT = 4
"""Children of a tree node; also the number of sibling query blocks that share candidates."""

HOME_OFFSETS = (-1, -1, 0, 1, 2, 4, 5, 6, 8, 9)
"""Per tree level, where a node lives relative to the first page after it; see ``node_home``."""


def num_blocks(num_tokens: int) -> int:
    """Blocks that hold ``num_tokens`` tokens, the last one perhaps partly filled."""
    return -(-num_tokens // BLOCK_SIZE)


def num_query_block_slots(total_q: int, batch: int) -> int:
    """Rows of a prefill selection: an upper bound on its query blocks that needs no device value.

    The true count is ``sum(ceil(q_len / 64))``, which lives on the device; this is its largest possible
    value.
    """
    return (total_q + (BLOCK_SIZE - 1) * batch) // BLOCK_SIZE


def node_home(level: int, node: int) -> int:
    """Logical page in whose slot tree node ``(level, node)`` is stored.

    The node covers pages ``[node * 4**level, (node + 1) * 4**level)`` and lives at the page
    ``(node + 1) * 4**level + HOME_OFFSETS[level]``: at or just after its last page. The offsets are such that

    * no page is home to two coarse nodes (level 1 takes pages 3 mod 4, level 2 pages 0 mod 16, level 3 pages
      1 mod 64, ...), so a tree of any depth costs one slot per page;
    * a node's children are complete when its home page is, so completing a page merges at most four nodes;
    * all pages of a node precede or equal its home, so whoever shares the home page (a prefix cache) shares
      exactly the tokens of the node: trees need no storage of their own per sequence.

    Level 0 (a page's own statistics) follows the same rule: its home is the page itself.
    """
    return int((node + 1) * FANOUT**level + HOME_OFFSETS[level])


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedKV:
    """One layer's paged keys and values for a batch of sequences, the tokens being computed included.

    k_pages, v_pages: ``[num_blocks, num_kv_heads, 64, head_dim]``, any strides, one floating dtype.
    block_table: ``[batch, max_blocks]`` int32, physical page of each logical page. Entries past a sequence's
        last page may hold any value and are never read through.
    seq_lens: ``[batch]`` int32, tokens in the cache of each sequence, this chunk included; 0 is allowed.

    Slots past a sequence's end may hold NaN. Raises InvalidArgument on a bad shape, dtype or device.
    """

    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    seq_lens: Tensor

    def __post_init__(self) -> None:
        check_shape("k_pages", self.k_pages, ("num_blocks", "num_kv_heads", BLOCK_SIZE, "head_dim"))
        check_shape("v_pages", self.v_pages, tuple(self.k_pages.shape))
        check_floating("k_pages", self.k_pages)
        check_same("v_pages", self.v_pages, "k_pages", self.k_pages)
        check_shape("block_table", self.block_table, ("batch", "max_blocks"))
        check_shape("seq_lens", self.seq_lens, (self.block_table.shape[0],))
        for name in ("block_table", "seq_lens"):
            tensor: Tensor = getattr(self, name)
            check_int32(name, tensor)
            check_same(name, tensor, "k_pages", self.k_pages, dtype=False)

    @property
    def batch(self) -> int:
        return self.block_table.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k_pages.shape[1]

    @property
    def head_dim(self) -> int:
        return self.k_pages.shape[3]


def check_queries(q: Tensor, kv: PagedKV, cu_seqlens_q: Tensor | None) -> None:
    """Raise InvalidArgument unless ``q`` fits ``kv``; without ``cu_seqlens_q``, one row a sequence."""
    rows: int | str = kv.batch if cu_seqlens_q is None else "total_q"
    check_shape("q", q, (rows, "num_q_heads", kv.head_dim))
    check_same("q", q, "k_pages", kv.k_pages)
    if q.shape[1] == 0 or q.shape[1] % kv.num_kv_heads != 0:
        needed = f"num_q_heads a multiple of num_kv_heads ({kv.num_kv_heads})"
        raise InvalidArgument("q", needed=needed, got=q.shape[1])
    if cu_seqlens_q is not None:
        check_shape("cu_seqlens_q", cu_seqlens_q, (kv.batch + 1,))
        check_int32("cu_seqlens_q", cu_seqlens_q)
        check_same("cu_seqlens_q", cu_seqlens_q, "q", q, dtype=False)
