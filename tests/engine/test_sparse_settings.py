"""Settings of sparse attention: refused by name, the same in every form, and agreeing with the kernels."""

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay import EngineConfig, SamplingParams, SparseAttention
from kvrelay.errors import InvalidConfig, InvalidRequest
from kvrelay.sparse import (
    BLOCK_TOKENS,
    GROUP_TOKENS,
    SELECTORS,
    AttentionUse,
    shareable_tokens,
    sparse_settings,
    starts_early,
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"selector": "best"},
        {"budget_tokens": 0},
        {"budget_tokens": 1000},
        {"budget_tokens": 128},  # 1 sink and 2 local blocks are 192 tokens
        {"budget_tokens": "many"},
        {"budget_tokens": True},
        {"sink_blocks": -1},
        {"local_blocks": 0},
        {"dense_layers": (-1,)},
        {"dense_layers": 3},
        {"dense_below_tokens": -1},
        {"dense_below_tokens": "now"},
        {"decode_budget_tokens": 100},
        {"decode_dense_below_tokens": -1},
        {"decode_dense_below_tokens": "auto"},
        {"decode_dense_below_tokens": 2**31},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"top_p": True},
        {"exact": 1},
        {"candidate_tokens": 100},
        {"candidate_tokens": -64},
        {"candidate_tokens": 2**31},
        {"candidate_tokens": "all"},
        {"selector": ["tree"]},
        {"dense_layers": ("0",)},
        {"dense_layers": (True,)},
        {"budget_tokens": 2**31},  # positions are counted in 32 bits
        {"budget_tokens": 64 * 10**30},
        {"decode_budget_tokens": 2**40},
        {"sink_blocks": 2**40},
        {"local_blocks": 10**30},
        {"dense_below_tokens": 2**31},
    ],
)
def test_a_bad_setting_is_refused_by_name(wrong: dict[str, Any]) -> None:
    (field,) = wrong
    with pytest.raises(InvalidConfig, match=f"^{field}="):
        SparseAttention(**wrong)
    with pytest.raises(InvalidConfig, match=rf"{field}(\[0\])?=(?!None)"):
        EngineConfig.of(model="m", attention=wrong)


numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([64, 576, 640, 2**31 - 64]), st.sampled_from([2**63, 2**64])
)
values = st.one_of(
    st.none(), st.booleans(), numbers, st.text(max_size=4), st.lists(numbers, max_size=3), st.just("auto")
)


@settings(deadline=None)  # the first example imports torch
@given(st.dictionaries(st.sampled_from(SparseAttention.__struct_fields__), values, max_size=4))
def test_whatever_is_asked_for_is_refused_by_name_or_can_be_computed(asked: dict[str, Any]) -> None:
    from kvrelay.attention.call import selection_config

    try:
        sparse = SparseAttention(**asked)
    except InvalidConfig:
        with pytest.raises(InvalidConfig, match=f"^({'|'.join(SparseAttention.__struct_fields__)})="):
            SparseAttention(**asked)
        with pytest.raises(InvalidConfig, match=r"^(attention|\w+=)"):
            EngineConfig.of(model="m", attention=asked)
        return
    assert msgspec.json.decode(msgspec.json.encode(sparse), type=SparseAttention) == sparse
    for num_pages in (1, 40):
        for one_by_one in (False, True):
            config = selection_config(sparse, num_pages, one_by_one=one_by_one)
            assert config.budget <= num_pages + 1
            assert config.num_candidates <= 2 * num_pages + 2


def test_settings_that_mean_the_same_are_written_alike() -> None:
    """Blocks have names by how their settings are written; workers and routers must agree on them."""
    one = SparseAttention(top_p=1, dense_layers=[2, 0, 2])  # type: ignore[arg-type]
    other = SparseAttention(top_p=1.0, dense_layers=(0, 2))
    assert msgspec.json.encode(one) == msgspec.json.encode(other)
    assert msgspec.json.decode(msgspec.json.encode(one), type=SparseAttention) == one
    assert SparseAttention(selector="local", top_p=0.2) == SparseAttention(selector="local", top_p=None)


def test_every_form_of_the_same_settings_is_equal() -> None:
    sparse = SparseAttention(budget_tokens=1024, dense_layers=(0,), dense_below_tokens=0)
    config = EngineConfig.of(model="m", attention=sparse)
    plain = msgspec.json.decode(msgspec.json.encode(config))["attention"]
    assert config.sparse() == EngineConfig.of(model="m", attention=plain).sparse() == sparse
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config
    params = msgspec.convert({"attention": plain}, SamplingParams)
    assert params == SamplingParams(attention=sparse)


def test_names_stand_for_settings() -> None:
    assert sparse_settings("dense") is None
    assert sparse_settings("auto") == SparseAttention()
    assert sparse_settings("sparse") == SparseAttention(dense_below_tokens=4096)
    with pytest.raises(InvalidConfig, match="attention='quick'"):
        EngineConfig.of(model="m", attention="quick")
    with pytest.raises(InvalidRequest, match="attention='quick'"):
        SamplingParams(attention="quick")
    with pytest.raises(InvalidRequest, match="attention=7"):
        SamplingParams(attention=7)  # type: ignore[arg-type]


def test_chunks_that_would_cut_a_selection_group_are_refused() -> None:
    assert EngineConfig.of(model="m", prefill_chunk_tokens=64).sparse() is None
    with pytest.raises(InvalidConfig, match="prefill_chunk_tokens=64"):
        EngineConfig.of(model="m", prefill_chunk_tokens=64, attention="sparse")


def test_names_and_sizes_are_the_kernel_librarys() -> None:
    import kvrelay_kernels
    from kvrelay_kernels.layout import FANOUT
    from kvrelay_kernels.selection import SelectionConfig

    assert sorted(SELECTORS) == sorted(kvrelay_kernels.SELECTORS)
    assert kvrelay_kernels.BLOCK_SIZE == BLOCK_TOKENS
    assert BLOCK_TOKENS * FANOUT == BLOCK_TOKENS * SelectionConfig(budget=9).sibling_blocks == GROUP_TOKENS


def test_whole_groups_only_are_shared() -> None:
    assert [shareable_tokens(n, None) for n in (63, 64, 255, 300)] == [0, 64, 192, 256]
    assert [shareable_tokens(n, SparseAttention()) for n in (63, 255, 256, 300, 512)] == [0, 0, 256, 256, 512]


def test_dense_positions_are_those_told_and_those_that_fit() -> None:
    def first(top_p: float | None = None, **settings: Any) -> int:
        return SparseAttention(top_p=top_p, **settings).first_sparse_position()

    assert first(budget_tokens=1024, dense_below_tokens=0) == 1024
    assert first(budget_tokens=1024, dense_below_tokens=1300) == 1536
    assert first(budget_tokens=704, dense_below_tokens=0) == 512
    assert first(budget_tokens=1024, dense_below_tokens=0, top_p=0.9) == 0
    less = SparseAttention(budget_tokens=1024, decode_budget_tokens=576, dense_below_tokens=0, top_p=None)
    assert (less.first_sparse_position(), less.first_sparse_position(is_generated=True)) == (1024, 512)
    assert [starts_early(less, length) for length in (500, 512, 2000)] == [False, True, True]


def test_uses_add_up() -> None:
    both = AttentionUse(2, 10, 20) + AttentionUse(3, 5, 40)
    assert (both.attended_tokens_per_query, both.share_of_pairs) == (3.0, 0.25)
    assert (AttentionUse().attended_tokens_per_query, AttentionUse().share_of_pairs) == (0.0, 1.0)
