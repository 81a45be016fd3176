"""Settings of sparse attention: one object, its names, and what it means for chunks and shared blocks.

Knows numbers and names. Knows no tensors: the selection itself is the kernel library's.
"""

from collections.abc import Iterable
from typing import Literal

import msgspec

from kvrelay.errors import InvalidConfig, UnknownName

BLOCK_TOKENS = 64  # of a KV page, which is also what is selected
GROUP_TOKENS = 4 * BLOCK_TOKENS
"""Prompt tokens whose selection may depend on each other: the sibling query blocks that share candidates.

Chunks and shared prefixes end at multiples of it, so that no result depends on where a prompt was cut.
"""
SELECTORS = ("tree", "two_stage", "quest", "mean_pool", "antidiagonal", "local", "oracle")
SELECTING_WITHOUT_KEYS = ("tree", "two_stage", "quest", "mean_pool", "local")
"""Selectors that name blocks by statistics, so that of all keys they read those of a few blocks, or none."""
MAX_TOKENS = 2**31 - 1  # positions are counted in 32 bits
HAND_OFFS = ("full", "sparse")
ATTENTION = ("dense", "sparse", "auto")
SELECTION = 2
"""Counts up when the same settings come to select other blocks, so that KV in files is not found then."""


class SparseAttention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which keys a query reads: at most `budget_tokens`, in blocks of 64, chosen per query block and KV head.

    Always among them are the first `sink_blocks`, the last `local_blocks` and the query's own block.
    `dense_layers` read everything. So do queries at positions below `dense_below_tokens`; `"auto"` measures
    once where selection starts to pay on this machine. `decode_budget_tokens` and `decode_dense_below_tokens`
    are for generated tokens; None is as for a prompt's, where `"auto"` measures theirs apart. `top_p` stops
    before the budget, once the blocks taken hold that share of the attention to the candidates, as the
    selector estimates it; None reads the whole budget, as `local`, which estimates none, always does.

    With `exact`, each query head has a list of its own, ranked by the largest share of attention that any
    query of a block gives. Without, the heads of a KV group share one, ranked by the mean of two of a block's
    64 queries: that is chosen in less time, and further from dense at the same number of keys.

    `tree` and `two_stage` name candidates by statistics and rank them by their keys: `candidate_tokens` keys,
    or twice the budget if that is more. These are read to choose; attention reads those chosen.

    Raises `InvalidConfig` or `UnknownName`, naming the field.
    """

    selector: str = "tree"
    budget_tokens: int = 4096
    sink_blocks: int = 1
    local_blocks: int = 2
    dense_layers: tuple[int, ...] = ()
    dense_below_tokens: int | Literal["auto"] = "auto"
    decode_budget_tokens: int | None = None
    decode_dense_below_tokens: int | None = None
    top_p: float | None = 0.97
    exact: bool = True
    candidate_tokens: int = 8192

    def __post_init__(self) -> None:
        _check_kinds(self)
        if self.selector not in SELECTORS:
            raise UnknownName(f"selector={self.selector!r}: expected one of {', '.join(SELECTORS)}")
        for field, (ok, expected) in self._rules().items():
            if not ok:
                raise InvalidConfig(f"{field}={getattr(self, field)!r}: expected {expected}")
        _write_alike(self)

    def _rules(self) -> dict[str, tuple[bool, str]]:
        forced = (self.sink_blocks + self.local_blocks) * BLOCK_TOKENS
        least = max(forced, BLOCK_TOKENS)
        reason = f"at least {least} (sink_blocks + local_blocks), at most {MAX_TOKENS}"
        budget = f"a multiple of {BLOCK_TOKENS}, {reason}"
        below, decode_below = self.dense_below_tokens, self.decode_dense_below_tokens
        decode, most = self.decode_budget_tokens, MAX_TOKENS // BLOCK_TOKENS
        return {
            "sink_blocks": (0 <= self.sink_blocks <= most, f"0 to {most}"),
            "local_blocks": (1 <= self.local_blocks <= most, f"1, the query's own, to {most}"),
            "budget_tokens": (_is_whole(self.budget_tokens, least), budget),
            "decode_budget_tokens": (decode is None or _is_whole(decode, least), budget),
            "dense_layers": (all(layer >= 0 for layer in self.dense_layers), "layer numbers from 0"),
            "dense_below_tokens": (
                below == "auto" or 0 <= below <= MAX_TOKENS,
                f"'auto' or 0 to {MAX_TOKENS}",
            ),
            "decode_dense_below_tokens": (
                decode_below is None or 0 <= decode_below <= MAX_TOKENS,
                f"0 to {MAX_TOKENS}, or None",
            ),
            "top_p": (self.top_p is None or 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            "candidate_tokens": (
                _is_whole(self.candidate_tokens, 0),
                f"a multiple of {BLOCK_TOKENS} from 0 to {MAX_TOKENS}",
            ),
        }

    def with_crossover(self, prompt: int, generated: int | None) -> "SparseAttention":
        """These settings with what `"auto"` stands for; a number that was asked for stays."""
        own = self.decode_dense_below_tokens
        return msgspec.structs.replace(
            self,
            dense_below_tokens=prompt,
            decode_dense_below_tokens=generated if own is None else own,
        )

    def budget(self, *, is_generated: bool) -> int:
        """Most keys that a prompt's token, or a generated one, reads."""
        return (self.decode_budget_tokens if is_generated else None) or self.budget_tokens

    def first_sparse_position(self, *, is_generated: bool = False) -> int:
        """Tokens at positions before this one read everything: as told, or because it fits in the budget.

        A multiple of `GROUP_TOKENS`. `dense_below_tokens` must have been measured if it was `"auto"`.
        """
        below = self.decode_dense_below_tokens if is_generated else None
        if below is None:
            assert self.dense_below_tokens != "auto"
            below = self.dense_below_tokens
        told = -(-below // GROUP_TOKENS) * GROUP_TOKENS
        budget = self.budget(is_generated=is_generated)
        return max(told, 0 if self.top_p is not None else budget // GROUP_TOKENS * GROUP_TOKENS)


class AttentionUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What attention read, counted over layers and KV heads: rows, pairs read, pairs a dense pass reads.

    Where the query heads of a group have lists of their own, their mean counts, rounded down.
    """

    num_queries: int = 0
    attended_pairs: int = 0
    causal_pairs: int = 0

    def __add__(self, other: "AttentionUse") -> "AttentionUse":
        return AttentionUse(
            self.num_queries + other.num_queries,
            self.attended_pairs + other.attended_pairs,
            self.causal_pairs + other.causal_pairs,
        )

    @property
    def attended_tokens_per_query(self) -> float:
        """Keys that a query of one layer and KV head read, on average; 0 where there was no query."""
        return self.attended_pairs / max(1, self.num_queries)

    @property
    def share_of_pairs(self) -> float:
        """Share of the (query, key) pairs of dense attention; 1 where there was no query."""
        return self.attended_pairs / self.causal_pairs if self.causal_pairs else 1.0


def sparse_settings(attention: "str | SparseAttention") -> SparseAttention | None:
    """What a name stands for; None is dense.

    `"auto"` is the default settings, dense below the machine's crossover. `"sparse"` is dense up to the
    budget in its place, so that results are the same on every machine. Raises `UnknownName`.
    """
    if isinstance(attention, SparseAttention):
        return attention
    if attention not in ATTENTION:
        raise UnknownName(f"attention={attention!r}: expected {', '.join(ATTENTION)} or SparseAttention(...)")
    if attention == "dense":
        return None
    auto = SparseAttention()
    if attention == "auto":
        return auto
    return msgspec.structs.replace(auto, dense_below_tokens=auto.budget_tokens)


def settings_of(
    asked: "str | SparseAttention | None", engine: SparseAttention | None
) -> SparseAttention | None:
    """A request's settings: those asked for, or the engine's, whose measured numbers `"auto"` stands for.

    Dense, None, whatever is asked for, where the engine is.
    """
    if engine is None or asked is None:
        return engine
    chosen = sparse_settings(asked)
    if chosen is not None and chosen.dense_below_tokens == "auto":
        assert engine.dense_below_tokens != "auto"
        chosen = chosen.with_crossover(engine.dense_below_tokens, engine.decode_dense_below_tokens)
    return chosen


def starts_early(sparse: SparseAttention | None, num_tokens: int) -> bool:
    """Whether a token generated after `num_tokens` others can be computed before all of their KV is there."""
    return (
        sparse is not None
        and sparse.selector in SELECTING_WITHOUT_KEYS
        and num_tokens >= sparse.first_sparse_position(is_generated=True)
    )


def check_hand_off(kv_handoff: str, sparse: SparseAttention | None, *, is_colocated: bool) -> None:
    """Raise `UnknownName` or `InvalidConfig` for a hand-off that there is not, or not with the rest."""
    if kv_handoff not in HAND_OFFS:
        raise UnknownName(f"kv_handoff={kv_handoff!r}: expected one of {', '.join(HAND_OFFS)}")
    if kv_handoff == "full":
        return
    if is_colocated:
        raise InvalidConfig("kv_handoff='sparse': with mode='colocated' no KV is handed off")
    if sparse is None:
        raise InvalidConfig("kv_handoff='sparse': with attention='dense' every token reads all KV")
    if sparse.selector not in SELECTING_WITHOUT_KEYS:
        raise InvalidConfig(
            f"kv_handoff='sparse': selector={sparse.selector!r} reads all keys to select; "
            f"expected one of {', '.join(SELECTING_WITHOUT_KEYS)}"
        )


def check_whole_groups(chunks: Iterable[int | None]) -> None:
    """Raise `InvalidConfig` for a chunk length that would cut a selection group; None is a whole prompt."""
    for chunk in chunks:
        if chunk is not None and chunk % GROUP_TOKENS:
            raise InvalidConfig(
                f"prefill_chunk_tokens={chunk}: expected a multiple of {GROUP_TOKENS}, or None, "
                f"with sparse attention, which selects for {GROUP_TOKENS} tokens together"
            )


def shareable_tokens(num_prefilled: int, sparse: SparseAttention | None) -> int:
    """Of the first `num_prefilled` prompt tokens, how many have KV that any longer prompt would have too.

    Whole selection groups only: the last, cut short by the prompt's end, has seen fewer queries than it
    would in a longer prompt. Dense attention looks back alone, so there every whole block is shareable.
    """
    unit = BLOCK_TOKENS if sparse is None else GROUP_TOKENS
    return num_prefilled // unit * unit


def _check_kinds(sparse: SparseAttention) -> None:
    """What a decoder checks by itself, for settings written in Python."""
    if not isinstance(sparse.dense_layers, list | tuple):
        raise InvalidConfig(f"dense_layers={sparse.dense_layers!r}: expected layer numbers")
    names = ("budget_tokens", "sink_blocks", "local_blocks", "candidate_tokens")
    whole = {name: getattr(sparse, name) for name in names}
    for name in ("decode_budget_tokens", "decode_dense_below_tokens"):
        if (value := getattr(sparse, name)) is not None:
            whole[name] = value
    if sparse.dense_below_tokens != "auto":
        whole["dense_below_tokens"] = sparse.dense_below_tokens
    for field, value in [*whole.items(), *(("dense_layers", layer) for layer in sparse.dense_layers)]:
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidConfig(f"{field}={value!r}: expected an integer")
    if sparse.top_p is not None and (
        isinstance(sparse.top_p, bool) or not isinstance(sparse.top_p, int | float)
    ):
        raise InvalidConfig(f"top_p={sparse.top_p!r}: expected a number or None")
    if not isinstance(sparse.exact, bool):
        raise InvalidConfig(f"exact={sparse.exact!r}: expected true or false")


def _write_alike(sparse: SparseAttention) -> None:
    """One form for settings that mean the same: blocks are named, and found, by how they are written."""
    msgspec.structs.force_setattr(sparse, "dense_layers", tuple(sorted(set(sparse.dense_layers))))
    if sparse.top_p is not None:
        top_p = None if sparse.selector == "local" else float(sparse.top_p)
        msgspec.structs.force_setattr(sparse, "top_p", top_p)


def _is_whole(tokens: int, least: int) -> bool:
    return tokens % BLOCK_TOKENS == 0 and least <= tokens <= MAX_TOKENS
