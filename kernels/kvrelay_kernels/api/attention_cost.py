"""``attention_cost``: what causal prefill of n tokens costs, for us and for the published alternatives."""

from dataclasses import dataclass

from kvrelay_kernels.errors import UnknownName
from kvrelay_kernels.layout import BLOCK_SIZE, FANOUT, num_blocks
from kvrelay_kernels.selection import SelectionConfig

SSA_KEYS = 8192
DSA_KEYS = 2048
DSA_INDEXER_HEADS = 64
DSA_INDEXER_DIM = 128
METHODS = ("dense", "tree", "ssa", "dsa")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One layer's attention: heads, channels, and bytes per element of q, k, v and out."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCost:
    """Causal prefill of a whole sequence by one layer.

    attended_pairs: (query, key) pairs of one head. attention_flops: 4 * head_dim per pair and query head.
    selection_flops: finding the keys. bytes: q, out, and each KV tile once per query block and KV head (dense
    FlashAttention tiles of 128 rows; sparse lists of 64 rows), the tree's own reads included.
    """

    attended_pairs: int
    attention_flops: int
    selection_flops: int
    bytes: int


def attention_cost(
    method: str, num_tokens: int, shape: AttentionShape, config: SelectionConfig | None = None
) -> AttentionCost:
    """Cost of ``num_tokens`` of causal prefill by ``dense``, ``tree`` (needs ``config``), ``ssa`` or ``dsa``.

    ssa: ``min(p, 8192)`` keys at position p, which reproduces SubQ's published reductions; its selection is
    not published and counts 0. dsa: ``min(p, 2048)`` keys and an indexer over all pairs, 64 heads of 128
    (DeepSeek-V3.2 report, sec. 2.1). Raises UnknownName for another method or a missing config.
    """
    dense_pairs = num_tokens * (num_tokens + 1) // 2
    match method:
        case "dense":
            return _cost(num_tokens, shape, dense_pairs, 0, dense_pairs // 128)
        case "tree" if config is not None:
            pairs = _block_pairs(num_tokens, config.budget)
            flops, keys = _tree_selection(num_tokens, shape, config)
            return _cost(num_tokens, shape, pairs, flops, pairs // BLOCK_SIZE + keys // 2)
        case "ssa":
            pairs = _capped_pairs(num_tokens, SSA_KEYS)
            return _cost(num_tokens, shape, pairs, 0, pairs)
        case "dsa":
            pairs = _capped_pairs(num_tokens, DSA_KEYS)
            indexer = 2 * DSA_INDEXER_HEADS * DSA_INDEXER_DIM * dense_pairs
            return _cost(num_tokens, shape, pairs, indexer, pairs)
    raise UnknownName(f"unknown method {method!r}, or 'tree' without config; expected one of {METHODS}")


def _cost(
    num_tokens: int, shape: AttentionShape, pairs: int, selection_flops: int, kv_rows: int
) -> AttentionCost:
    """``kv_rows``: rows of K, and of V, read per KV head."""
    q_and_out = 2 * num_tokens * shape.num_q_heads
    return AttentionCost(
        attended_pairs=pairs,
        attention_flops=4 * shape.head_dim * shape.num_q_heads * pairs,
        selection_flops=selection_flops,
        bytes=(q_and_out + 2 * kv_rows * shape.num_kv_heads) * shape.head_dim * shape.element_bytes,
    )


def _capped_pairs(num_tokens: int, keys: int) -> int:
    """Sum over positions p = 1..n of ``min(p, keys)``."""
    short = min(num_tokens, keys)
    return short * (short + 1) // 2 + (num_tokens - short) * keys


def _block_pairs(num_tokens: int, budget: int) -> int:
    """Pairs when every query block takes ``min(budget, all)`` blocks, its own under the causal mask."""
    pairs = 0
    full, rest = divmod(num_tokens, BLOCK_SIZE)
    distant = sum(min(block, budget - 1) for block in range(min(full, budget)))
    distant += max(0, full - budget) * (budget - 1)
    pairs += distant * BLOCK_SIZE**2 + full * BLOCK_SIZE * (BLOCK_SIZE + 1) // 2
    return pairs + rest * min(full, budget - 1) * BLOCK_SIZE + rest * (rest + 1) // 2


def _tree_selection(num_tokens: int, shape: AttentionShape, config: SelectionConfig) -> tuple[int, int]:
    """(FLOPs, K rows or box rows read per KV head) of the tree and rerank, statistics included."""
    flops = rows_read = 0
    width = config.sibling_blocks
    for frontier in range(0, num_blocks(num_tokens), width):
        siblings = min(width, num_blocks(num_tokens) - frontier)
        boxes = _boxes_scored(frontier, config.beam)
        listed = min(frontier, config.num_candidates + config.sink_blocks + config.local_blocks) + siblings
        keys = listed * BLOCK_SIZE
        pooled = siblings * shape.num_q_heads
        flops += pooled * (4 * boxes + 2 * config.sampled_queries * keys) * shape.head_dim
        rows_read += 2 * boxes + keys
    statistics = 7 * num_tokens * shape.num_kv_heads * shape.head_dim
    return flops + statistics, rows_read + num_tokens


def _boxes_scored(frontier: int, beam: int) -> int:
    """Tree nodes and pages whose box is scored on the way down, at most."""
    level = 0
    while -(-frontier // FANOUT**level) > beam:
        level += 1
    nodes = int(-(-frontier // FANOUT**level))
    return nodes + level * FANOUT * (min(beam, nodes) + 2)
