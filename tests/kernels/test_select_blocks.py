"""Every selector: forced blocks, causality, invariances; scores against an independent oracle."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvrelay_kernels as kk
from kernel_batches import DEVICE, Batch, decode_queries, make_batch
from kvrelay_kernels.reference.query_groups import query_groups
from kvrelay_kernels.reference.select_blocks_flat import box_bound
from kvrelay_kernels.reference.sequences import iterate_chunks
from kvrelay_kernels.selectors import selector_location

SELECTORS = sorted(kk.SELECTORS)


def select(batch: Batch, config: kk.SelectionConfig, impl: str = "reference") -> kk.BlockSelection:
    skip_without_kernel(config.selector, impl)
    stats = kk.kv_block_stats(batch.kv)
    return kk.select_blocks(
        batch.q, batch.kv, config, cu_seqlens_q=batch.cu_seqlens_q, stats=stats, impl=impl
    )


def skip_without_kernel(selector: str, impl: str) -> None:
    if impl == "triton" and selector in ("oracle", "antidiagonal"):
        pytest.skip(f"selector {selector} has no triton kernel")


def reference_scores(batch: Batch, config: kk.SelectionConfig) -> list[list[dict[int, float]]]:
    """Per query block and KV head, the reference's score of every block that it considered."""
    module, function = selector_location(config.selector)
    selector = getattr(import_module(f"kvrelay_kernels.reference.{module}"), function)
    stats = kk.kv_block_stats(batch.kv, impl="reference")
    scores = []
    for chunk in iterate_chunks(batch.kv, batch.cu_seqlens_q, batch.q.shape[0], stats):
        rows = batch.q[chunk.first_row : chunk.first_row + chunk.q_len]
        for group in query_groups(chunk, rows, config.sibling_blocks):
            scored = selector(group, config, batch.q.shape[2] ** -0.5)
            blocks = scored.blocks.tolist()
            scores += [
                [dict(zip(*pair, strict=True)) for pair in zip(blocks, block, strict=True)]
                for block in scored.scores.transpose(0, 1).tolist()
            ]
    return scores


def lists(selection: kk.BlockSelection, slot: int, head: int) -> list[int]:
    return selection.indices[slot, head, : selection.counts[slot, head]].tolist()


@pytest.mark.parametrize("selector", SELECTORS)
def test_forced_blocks_are_in_and_lists_are_full_ascending_and_causal(
    impl: str, working_dtype: torch.dtype, selector: str
) -> None:
    batch = make_batch([(0, 64 * 13 + 5), (0, 0), (64 * 5, 1), (64 * 8, 64)], dtype=working_dtype)
    selection = select(batch, kk.SelectionConfig(budget=5, selector=selector, sink_blocks=1), impl)
    offsets = (batch.kv.seq_lens - batch.cu_seqlens_q.diff()).tolist()
    for sequence, offset in enumerate(offsets):
        first, last = selection.cu_q_blocks[sequence : sequence + 2].tolist()
        for slot in range(first, last):
            own = offset // 64 + slot - first
            for head in range(2):
                listed = lists(selection, slot, head)
                assert listed == sorted(set(listed))
                assert len(listed) == min(5, own + 1)
                assert {0, max(own - 1, 0), own} <= set(listed)
                assert listed[-1] == own
                assert (selection.indices[slot, head, len(listed) :] == -1).all()
    assert (selection.counts[int(selection.cu_q_blocks[-1]) :] == 0).all()


@pytest.mark.parametrize("selector", SELECTORS)
def test_lists_agree_with_the_reference_up_to_ties(
    impl: str, working_dtype: torch.dtype, selector: str
) -> None:
    batch = make_batch([(64 * 40, 70), (64 * 7, 64 * 2)], seed=3, dtype=working_dtype)
    config = kk.SelectionConfig(budget=4, selector=selector, candidate_factor=1.5)
    want, got = (select(batch, config, name) for name in ("reference", impl))
    for slot, heads in enumerate(reference_scores(batch, config)):
        for head, score in enumerate(heads):
            mine, theirs = (set(lists(selection, slot, head)) for selection in (got, want))
            assert mine <= score.keys()
            assert sum(score[block] for block in mine) == pytest.approx(
                sum(score[block] for block in theirs), abs=1e-5
            ), (mine, theirs)


def test_ranking_by_every_query_of_one_head_is_the_oracles(impl: str, working_dtype: torch.dtype) -> None:
    """Lists for each query head alone: one head of every group at a time, all 64 rows sampled."""
    batch = make_batch([(64 * 4, 64 * 2), (64 * 7, 64)], dtype=working_dtype)
    config = kk.SelectionConfig(budget=4, sampled_queries=64, candidate_factor=2.0)  # every block a candidate
    for member in range(2):
        alone = replace(batch, q=batch.q[:, member::2])
        want = select(alone, replace(config, selector="oracle"))
        got = select(alone, config, impl)
        scores = reference_scores(alone, replace(config, selector="oracle"))
        for slot, heads in enumerate(scores):
            for head, score in enumerate(heads):
                mine, best = (sum(score[b] for b in lists(which, slot, head)) for which in (got, want))
                assert mine == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("top_p", [None, 0.8])
@pytest.mark.parametrize("sampled", [2, 64])
@pytest.mark.parametrize("selector", ["tree", "two_stage", "oracle"])
def test_lists_by_peak_are_the_reference_s(
    impl: str, working_dtype: torch.dtype, selector: str, sampled: int, top_p: float | None
) -> None:
    batch = make_batch([(64 * 40, 70), (64 * 7, 64 * 2)], seed=3, heads=(2, 2), dtype=working_dtype)
    by_mean = kk.SelectionConfig(
        budget=6, selector=selector, candidate_factor=1.5, sampled_queries=sampled, top_p=top_p
    )
    by_peak = replace(by_mean, by_peak=True)
    want = select(batch, by_peak)
    assert torch.equal(select(batch, by_peak, impl).indices, want.indices)
    assert not torch.equal(select(batch, by_mean).indices, want.indices)


@pytest.mark.parametrize("selector", ["tree", "two_stage", "oracle"])
def test_a_block_that_one_query_reads_is_found_by_peak(impl: str, selector: str) -> None:
    """Row 40 looks at block 3 alone, the others spread over four other blocks: by mean those come first."""
    batch = make_batch([(64 * 12, 64)], heads=(1, 1), dtype=torch.float32)
    q, k_pages = torch.zeros_like(batch.q), torch.zeros_like(batch.kv.k_pages)
    q[..., 0], q[40, :, 0], q[40, :, 1] = 8.0, 0.0, 8.0
    pages = batch.kv.block_table[0].long()
    k_pages[pages[5:9], ..., 0], k_pages[pages[3], ..., 1] = 8.0, 8.0
    planted = replace(batch, q=q, kv=replace(batch.kv, k_pages=k_pages))
    config = kk.SelectionConfig(budget=6, selector=selector, sampled_queries=64)
    found = [set(lists(select(planted, replace(config, by_peak=how), impl), 0, 0)) for how in (False, True)]
    assert found[0] == {0, 5, 6, 7, 11, 12}
    assert found[1] == {0, 3, 5, 6, 11, 12}


@pytest.mark.parametrize("selector", SELECTORS)
def test_decode_lists_at_every_length_edge(impl: str, working_dtype: torch.dtype, selector: str) -> None:
    skip_without_kernel(selector, impl)
    lengths = [0, 1, 63, 64, 65, 129, 64 * 30 + 1]
    batch = make_batch([(n, 0) for n in lengths], dtype=working_dtype)
    config = kk.SelectionConfig(budget=4, selector=selector)
    stats = kk.kv_block_stats(batch.kv)
    selection = kk.select_blocks(decode_queries(batch), batch.kv, config, stats=stats, impl=impl)
    assert selection.cu_q_blocks.tolist() == list(range(len(lengths) + 1))
    for slot, length in enumerate(lengths):
        own = (length - 1) // 64
        listed = lists(selection, slot, 1)
        assert len(listed) == (min(4, own + 1) if length else 0)
        assert not length or {0, own} <= set(listed)


@pytest.mark.parametrize("selector", ["tree", "two_stage"])
def test_decode_lists_do_not_depend_on_who_reads_the_same_pages(
    impl: str, working_dtype: torch.dtype, selector: str
) -> None:
    """Heads with lists of their own are sequences over the same pages, whose candidates differ."""
    batch = make_batch([(64 * 40 + 9, 1), (64 * 40 + 9, 1), (64 * 7, 1)], seed=5, dtype=working_dtype)
    order = [0, 2, 0, 1, 0]
    shared = replace(batch.kv, block_table=batch.kv.block_table[order], seq_lens=batch.kv.seq_lens[order])
    q = decode_queries(replace(batch, kv=shared))
    config = kk.SelectionConfig(budget=4, selector=selector, candidate_factor=1.5)
    stats = kk.kv_block_stats(batch.kv)
    together = kk.select_blocks(q, shared, config, stats=stats, impl=impl)
    reference = kk.select_blocks(q, shared, config, stats=stats, impl="reference")
    for row in range(5):
        own = replace(
            shared, block_table=shared.block_table[row : row + 1], seq_lens=shared.seq_lens[row : row + 1]
        )
        alone = kk.select_blocks(q[row : row + 1], own, config, stats=stats, impl=impl)
        assert torch.equal(together.indices[row], alone.indices[0])
        for head in range(2):
            assert lists(together, row, head) == lists(reference, row, head)
    assert not torch.equal(together.indices[0], together.indices[2])


@pytest.mark.parametrize("selector", SELECTORS)
def test_budget_of_all_equals_dense(impl: str, working_dtype: torch.dtype, selector: str) -> None:
    batch = make_batch([(0, 64 * 9 + 7), (128, 65)], dtype=working_dtype)
    selection = select(batch, kk.SelectionConfig(budget=12, selector=selector), impl)
    torch.testing.assert_close(
        kk.block_sparse_prefill(batch.q, batch.kv, batch.cu_seqlens_q, selection, impl=impl),
        kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl=impl),
    )


@pytest.mark.parametrize("selector", SELECTORS)
def test_later_tokens_change_nothing_before_their_group(
    impl: str, selector: str, working_dtype: torch.dtype
) -> None:
    batch = make_batch([(0, 64 * 12)], dtype=working_dtype)
    config = kk.SelectionConfig(budget=4, selector=selector, candidate_factor=1.0)
    before = select(batch, config, impl)
    edited = batch.q.clone()
    edited[64 * 8 :] = torch.randn(64 * 4, *edited.shape[1:], dtype=edited.dtype)
    k_pages = batch.kv.k_pages.clone()
    k_pages[batch.kv.block_table[0, 8:12].long()] *= -5
    after = select(replace(batch, q=edited, kv=replace(batch.kv, k_pages=k_pages)), config, impl)
    assert torch.equal(before.indices[:8], after.indices[:8])


@pytest.mark.parametrize("selector", SELECTORS)
def test_chunks_and_batch_composition_do_not_matter(
    impl: str, selector: str, working_dtype: torch.dtype
) -> None:
    whole = make_batch([(0, 64 * 22 + 9)], dtype=working_dtype)
    config = kk.SelectionConfig(budget=4, selector=selector, candidate_factor=1.0)
    want = select(whole, config, impl)
    stats = kk.kv_block_stats(whole.kv)
    bounds = [0, 64 * 4, 64 * 16, 64 * 22 + 9]
    lengths = torch.tensor(
        bounds[1:], dtype=torch.int32, device=DEVICE
    )  # three chunks as three sequences of one batch
    kv = replace(whole.kv, block_table=whole.kv.block_table.expand(3, -1), seq_lens=lengths)
    cu_seqlens_q = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    got = kk.select_blocks(whole.q, kv, config, cu_seqlens_q=cu_seqlens_q, stats=stats, impl=impl)
    used = int(want.cu_q_blocks[-1])
    assert torch.equal(want.indices[:used], got.indices[:used])


def test_oracle_keeps_the_blocks_of_highest_exact_mass(impl: str, working_dtype: torch.dtype) -> None:
    batch = make_batch([(0, 64 * 8 + 3)], dtype=working_dtype)
    config = kk.SelectionConfig(budget=4, selector="oracle")
    selection = select(batch, config, impl)
    keys = batch.keys[0].repeat_interleave(2, 0)
    logits = batch.q.transpose(0, 1) @ keys.transpose(1, 2) / 8
    causal = torch.ones(logits.shape[1:], dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    mass = torch.stack([part.sum(-1) for part in weights.split(64, -1)], -1).view(2, 2, -1, 9).mean(1)
    rounding = 16 * torch.finfo(working_dtype).eps
    for slot in range(9):
        block_mass = mass[:, slot * 64 : (slot + 1) * 64].mean(1)
        for head in range(2):
            chosen = set(lists(selection, slot, head))
            free = chosen - {0, slot - 1, slot}
            left = set(range(slot + 1)) - chosen
            worst = min((block_mass[head, block].item() for block in free), default=1.0)
            assert all(block_mass[head, block].item() <= worst + rounding for block in left)


@pytest.mark.parametrize("selector", ["quest", "two_stage", "tree", "oracle", "antidiagonal", "mean_pool"])
@settings(max_examples=5, deadline=None)
@given(needle=st.integers(1, 140), seed=st.integers(0, 10**6))
def test_a_planted_block_is_found_through_the_tree(selector: str, needle: int, seed: int) -> None:
    batch = make_batch([(64 * 160, 40)], heads=(2, 1), seed=seed, dtype=torch.float32)
    direction = torch.nn.functional.normalize(
        torch.randn(64, generator=torch.Generator().manual_seed(seed)), dim=0
    )
    k_pages = batch.kv.k_pages.clone()
    k_pages[batch.kv.block_table[0, needle].long()] = direction * 20
    planted = replace(batch, q=direction.expand_as(batch.q) * 8, kv=replace(batch.kv, k_pages=k_pages))
    config = kk.SelectionConfig(budget=4, selector=selector, candidate_factor=2.0)
    assert needle in lists(select(planted, config), 0, 0)


def test_a_beam_of_everything_is_the_flat_scan_and_a_narrow_one_is_not(
    impl: str, working_dtype: torch.dtype
) -> None:
    batch = make_batch([(64 * 100, 64 * 4)], dtype=working_dtype)
    narrow = kk.SelectionConfig(budget=6, beam_factor=1.0, candidate_factor=1.0)
    flat = select(batch, replace(narrow, selector="two_stage"))
    assert torch.equal(select(batch, replace(narrow, selector="two_stage"), impl).indices, flat.indices)
    assert torch.equal(select(batch, replace(narrow, beam_factor=1000.0), impl).indices, flat.indices)
    assert not torch.equal(select(batch, narrow, impl).indices, flat.indices)


def test_top_p_stops_early_and_keeps_forced_blocks(impl: str, working_dtype: torch.dtype) -> None:
    batch = make_batch([(0, 64 * 20)], dtype=working_dtype)
    some = select(batch, kk.SelectionConfig(budget=10, selector="oracle", top_p=0.3), impl)
    every = select(batch, kk.SelectionConfig(budget=10, selector="oracle", top_p=1.0), impl)
    assert (some.counts <= every.counts).all()
    assert int(some.counts[19].max()) < 10
    assert {0, 18, 19} <= set(lists(some, 19, 0))
    assert int(every.counts[19].min()) == 10


@pytest.mark.parametrize("selector", ["tree", "quest"])
def test_top_p_of_selectors_without_the_oracle(impl: str, working_dtype: torch.dtype, selector: str) -> None:
    batch = make_batch([(64 * 12, 65)], heads=(2, 1), dtype=working_dtype)
    for top_p in (0.3, 0.8, 1.0):
        config = kk.SelectionConfig(budget=9, selector=selector, top_p=top_p)
        want, got = (select(batch, config, name) for name in ("reference", impl))
        assert torch.equal(got.counts, want.counts)
        assert torch.equal(got.indices, want.indices)


def test_mask_and_pair_count_agree_with_the_lists() -> None:
    batch = make_batch([(0, 64 * 6 + 5), (64, 70)])
    selection = select(batch, kk.SelectionConfig(budget=4))
    mask = selection.to_block_mask(1, 4, 70, 134)
    assert mask.kv_num_blocks.shape == (1, 4, 2)
    assert mask.kv_indices[0, 3, 1, : mask.kv_num_blocks[0, 3, 1]].tolist() == lists(selection, 8, 1)
    # sequence 1 attends to everything: rows 64..133 see 65..134 keys, in 2 heads
    first = int(
        sum(min(4, block + 1) - 1 for block in range(6)) * 64 * 64 + 6 * 64 * 65 / 2 + 3 * 64 * 5 + 15
    )
    want = 2 * (first + sum(range(65, 135)))
    assert selection.attended_pairs(batch.cu_seqlens_q.diff(), batch.kv.seq_lens) == want


def test_missing_statistics_and_bad_settings_are_refused() -> None:
    batch = make_batch([(0, 64 * 9)])
    with pytest.raises(kk.InvalidArgument, match="stats: needed"):
        kk.select_blocks(batch.q, batch.kv, kk.SelectionConfig(budget=4), cu_seqlens_q=batch.cu_seqlens_q)
    with pytest.raises(kk.InvalidArgument, match=r"budget: needed at least .*\(3\), got 2"):
        kk.SelectionConfig(budget=2)
    with pytest.raises(kk.UnknownName, match="unknown selector 'best'"):
        select(batch, kk.SelectionConfig(budget=4, selector="best"))


def test_groups_of_a_chunk_that_starts_inside_one_keep_absolute_bounds() -> None:
    batch = make_batch([(64 * 5, 64 * 5 + 1)])
    (chunk,) = iterate_chunks(batch.kv, batch.cu_seqlens_q, batch.q.shape[0])
    groups = list(query_groups(chunk, batch.q, 4))
    assert [group.own_blocks.tolist() for group in groups] == [[5, 6, 7], [8, 9, 10]]
    assert [group.frontier for group in groups] == [4, 8]


def test_box_bound_is_reached_by_a_corner_and_exceeded_by_no_key() -> None:
    generator = torch.Generator().manual_seed(0)
    q, keys = (torch.randn(1, n, 4, generator=generator, dtype=torch.float64) for n in (9, 50))
    lower, upper = keys.amin(1, keepdim=True), keys.amax(1, keepdim=True)
    corners = torch.cartesian_prod(*torch.stack([lower[0, 0], upper[0, 0]], -1))
    bound = box_bound(q, lower, upper)[0, :, 0]
    assert (q[0] @ keys[0].T <= bound[:, None]).all()
    torch.testing.assert_close((q[0] @ corners.T).amax(1), bound)


@pytest.mark.parametrize(("q_len", "want"), [(64, [8, 24, 40, 56]), (1, [0, 0, 0, 0]), (6, [0, 2, 3, 5])])
def test_heads_sample_different_rows_of_a_block(q_len: int, want: list[int]) -> None:
    batch = make_batch([(64, q_len)])
    (chunk,) = iterate_chunks(batch.kv, batch.cu_seqlens_q, q_len)
    (group,) = query_groups(chunk, batch.q, 4)
    rows, positions = group.sampled(2)
    assert positions.tolist() == [64 + row for row in want]  # sample-major, then head
    for index, row in enumerate(want):
        for head in range(2):
            assert torch.equal(rows[head, index], batch.q[row, 2 * head + index % 2])
