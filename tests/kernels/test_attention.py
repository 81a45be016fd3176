"""The four attention operations and the merge, against float64 eager attention, poison everywhere unread."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvrelay_kernels as kk
from kernel_batches import (
    DEVICE,
    DTYPES,
    EXACT,
    assert_accurate,
    decode_queries,
    eager,
    make_batch,
    poison_unselected,
    random_selection,
)

EDGES = [(0, 0), (0, 1), (0, 63), (64, 64), (0, 65), (128, 129), (192, 1), (256, 0)]
SHAPES = [(1, 1, 96), (16, 1, 64), (4, 2, 128), (6, 2, 256), (3, 3, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_dense_and_sparse_at_length_edges(impl: str, dtype: torch.dtype) -> None:
    batch = make_batch(EDGES, dtype=dtype)
    got = kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl=impl)
    assert_accurate(got, batch, batch.q, batch.q_lens, None)
    selection = random_selection(batch, 3)
    kv = poison_unselected(batch, selection).kv
    got = kk.block_sparse_prefill(batch.q, kv, batch.cu_seqlens_q, selection, impl=impl)
    assert_accurate(got, batch, batch.q, batch.q_lens, selection)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_dense_and_sparse_at_length_edges(impl: str, dtype: torch.dtype) -> None:
    batch = make_batch([(n, 0) for n in (0, 1, 63, 64, 65, 129, 300)], dtype=dtype)
    q, ones = decode_queries(batch), [1] * batch.kv.batch
    assert_accurate(kk.paged_decode(q, batch.kv, impl=impl), batch, q, ones, None)
    selection = random_selection(batch, 3, decode=True)
    kv = poison_unselected(batch, selection).kv
    got = kk.block_sparse_decode(q, kv, selection, impl=impl)
    assert_accurate(got, batch, q, ones, selection)


@pytest.mark.parametrize("loudest", [0, 9, 20])
def test_decode_weighs_the_splits_of_long_lists(impl: str, loudest: int) -> None:
    """One block's keys are so long that its split counts for most, whichever it is in."""
    batch = make_batch([(64 * 21, 0)] * 3, dtype=torch.float32)
    for keys, table in zip(batch.keys, batch.kv.block_table, strict=True):
        keys[:, 64 * loudest : 64 * (loudest + 1)] *= 2
        batch.kv.k_pages[table[loudest]] *= 2
    q, lists = decode_queries(batch), random_selection(batch, 20, decode=True)
    dense, sparse = (
        kk.paged_decode(q, batch.kv, impl=impl),
        kk.block_sparse_decode(q, batch.kv, lists, impl=impl),
    )
    for got, selection in ((dense, None), (sparse, lists)):
        want = eager(batch, q, [1] * 3, selection, torch.float64)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, check_dtype=False)


@pytest.mark.parametrize(("selector", "top_p"), [("tree", None), ("tree", 0.8), ("two_stage", 0.8)])
@pytest.mark.parametrize(("heads", "sampled"), [((2, 2), 64), ((2, 2), 2), ((4, 2), 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_prefill_is_selection_then_attention(
    impl: str,
    dtype: torch.dtype,
    heads: tuple[int, int],
    sampled: int,
    selector: str,
    top_p: float | None,
) -> None:
    batch = make_batch([(64 * 8, 200), (0, 257), (0, 0), (64 * 4, 1), (256, 256)], heads=heads, dtype=dtype)
    config = kk.SelectionConfig(
        budget=4,
        selector=selector,
        sampled_queries=sampled,
        by_peak=top_p is not None,
        candidate_factor=1.5,
        top_p=top_p,
    )
    stats = kk.kv_block_stats(batch.kv)
    chosen = kk.select_blocks(
        batch.q, batch.kv, config, cu_seqlens_q=batch.cu_seqlens_q, stats=stats, impl=impl
    )
    assert chosen.counts.max() > chosen.counts[chosen.counts > 0].min()
    kv = replace(batch.kv, v_pages=poison_unselected(batch, chosen).kv.v_pages)
    *got, selection = kk.sparse_prefill(batch.q, kv, batch.cu_seqlens_q, config, stats=stats, impl=impl)
    for name in ("indices", "counts", "cu_q_blocks"):
        assert torch.equal(getattr(selection, name), getattr(chosen, name))
    assert_accurate(tuple(got), batch, batch.q, batch.q_lens, chosen)


def test_sparse_prefill_refuses_what_its_parts_refuse(impl: str, working_dtype: torch.dtype) -> None:
    batch = make_batch([(64, 70)], heads=(2, 2), dtype=working_dtype)
    config, stats = kk.SelectionConfig(budget=4, sampled_queries=64), kk.kv_block_stats(batch.kv)

    def refused(match: str, **changed: object) -> None:
        given = {"q": batch.q, "kv": batch.kv, "cu_seqlens_q": batch.cu_seqlens_q, "config": config}
        with pytest.raises(kk.InvalidArgument, match=match):
            kk.sparse_prefill(**{**given, "stats": stats, "impl": impl, **changed})

    refused("stats: needed", stats=None)
    refused("stats", stats=kk.KVBlockStats.empty(batch.kv.k_pages[1:]))
    refused("scale: needed a positive number", scale=0.0)
    refused("multiple of 64", kv=replace(batch.kv, seq_lens=batch.kv.seq_lens - 1))
    refused("cu_seqlens_q: needed dtype int32", cu_seqlens_q=batch.cu_seqlens_q.long())


def test_a_row_whose_best_block_is_not_in_the_list(impl: str, working_dtype: torch.dtype) -> None:
    """One row's logits are 225 there, where all others' are -20: its weights elsewhere must not be lost."""
    batch = make_batch([(64 * 8, 64)], heads=(1, 1), dtype=working_dtype)
    batch.q[:, 0, :2] = torch.tensor([0.0, 8.0], dtype=working_dtype, device=DEVICE)
    batch.q[5, 0, :2] = torch.tensor([30.0, 0.0], dtype=working_dtype, device=DEVICE)
    keys = batch.keys[0][0].unflatten(0, (-1, 64))
    keys[:, :, :2] = 0
    keys[3, :, 0], keys[3, :, 1] = 60, -20
    batch.kv.k_pages[batch.kv.block_table[0, :9].long(), 0] = keys
    config = kk.SelectionConfig(budget=4, sampled_queries=64)
    stats = kk.kv_block_stats(batch.kv)
    *got, selection = kk.sparse_prefill(batch.q, batch.kv, batch.cu_seqlens_q, config, stats=stats, impl=impl)
    assert 3 not in selection.indices[0, 0].tolist()
    want = eager(batch, batch.q, batch.q_lens, selection, torch.float64)
    torch.testing.assert_close(tuple(got), want, atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "head_dim"), SHAPES)
def test_every_head_dim_and_group(impl: str, num_q_heads: int, num_kv_heads: int, head_dim: int) -> None:
    heads = (num_q_heads, num_kv_heads)
    batch = make_batch([(128, 100)], heads=heads, head_dim=head_dim, dtype=torch.float32)
    selection = random_selection(batch, 2)
    got = kk.block_sparse_prefill(batch.q, batch.kv, batch.cu_seqlens_q, selection, impl=impl)
    assert_accurate(got, batch, batch.q, batch.q_lens, selection)


def test_paged_prefill_takes_any_chunk_offset(impl: str, working_dtype: torch.dtype) -> None:
    batch = make_batch([(37, 90), (1, 1)], dtype=working_dtype)
    got = kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl=impl)
    assert_accurate(got, batch, batch.q, batch.q_lens, None)


def test_constant_values_come_out_unchanged(impl: str, working_dtype: torch.dtype) -> None:
    batch = make_batch([(64, 130)], dtype=working_dtype)
    v_pages = batch.kv.v_pages.clone()
    v_pages[~v_pages.isnan()] = 3.0
    kv = replace(batch.kv, v_pages=v_pages)
    selection = random_selection(batch, 2)
    out, _ = kk.block_sparse_prefill(batch.q, kv, batch.cu_seqlens_q, selection, impl=impl)
    torch.testing.assert_close(out, torch.full_like(out, 3.0))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 400), splits=st.integers(1, 4))
def test_merging_splits_equals_not_splitting(seed: int, tokens: int, splits: int) -> None:
    batch = make_batch([(0, tokens)], seed=seed)
    whole = random_selection(batch, 7, seed=seed)
    parts = []
    for part in range(splits):  # a split holds every splits-th entry of each list, perhaps none
        indices = torch.full_like(whole.indices, -1)
        taken = whole.indices[..., part::splits]
        indices[..., : taken.shape[-1]] = taken
        counts = (taken >= 0).sum(-1).to(torch.int32)
        parts.append(kk.BlockSelection(indices=indices, counts=counts, cu_q_blocks=whole.cu_q_blocks))
    results = [kk.block_sparse_prefill(batch.q, batch.kv, batch.cu_seqlens_q, part) for part in parts]
    outs, lses = (torch.stack(column) for column in zip(*results, strict=True))
    outs = outs.masked_fill((lses == -torch.inf)[..., None], torch.nan)
    merged = kk.merge_attention_states(outs, lses)
    torch.testing.assert_close(merged, kk.block_sparse_prefill(batch.q, batch.kv, batch.cu_seqlens_q, whole))


def test_merging_many_splits_weighs_each_by_its_sum(impl: str) -> None:
    generator = torch.Generator().manual_seed(0)
    outs, lses = (torch.randn(shape, generator=generator) for shape in ((37, 2, 3, 64), (37, 2, 3)))
    lses *= 4
    lses[5], outs[5] = -torch.inf, torch.nan
    weights = lses.double().softmax(0)[..., None]
    want = torch.where(weights > 0, outs.double() * weights, 0.0).sum(0)
    out, lse = kk.merge_attention_states(outs.to(DEVICE), lses.to(DEVICE), impl=impl)
    torch.testing.assert_close(out.cpu(), want.float())
    torch.testing.assert_close(lse.cpu(), lses.logsumexp(0))


def test_merging_rows_empty_in_every_split_gives_zero(impl: str) -> None:
    out, lse = kk.merge_attention_states(
        torch.full((2, 1, 1, 64), torch.nan, device=DEVICE),
        torch.full((2, 1, 1), -torch.inf, device=DEVICE),
        impl=impl,
    )
    assert torch.equal(out.cpu(), torch.zeros(1, 1, 64))
    assert lse.item() == -torch.inf


def test_list_order_does_not_matter(impl: str, working_dtype: torch.dtype) -> None:
    batch = make_batch([(256, 70)], dtype=working_dtype)
    shuffled = random_selection(batch, 4)
    key = shuffled.indices.masked_fill(shuffled.indices < 0, 2**30).sort(-1).values
    ascending = replace(shuffled, indices=key.masked_fill(key == 2**30, -1))
    torch.testing.assert_close(
        kk.block_sparse_prefill(batch.q, batch.kv, batch.cu_seqlens_q, shuffled, impl=impl),
        kk.block_sparse_prefill(batch.q, batch.kv, batch.cu_seqlens_q, ascending, impl=impl),
    )


def test_bad_arguments_say_what_was_needed_and_given() -> None:
    batch = make_batch([(0, 70)])
    with pytest.raises(kk.InvalidArgument, match=r"q: needed .*multiple of num_kv_heads \(2\), got 3"):
        kk.paged_prefill(batch.q[:, :3], batch.kv, batch.cu_seqlens_q)
    with pytest.raises(kk.InvalidArgument, match=r"cu_seqlens_q: needed dtype int32, got torch.int64"):
        kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q.long())
    kv = replace(batch.kv, seq_lens=batch.kv.seq_lens - 1)
    with pytest.raises(kk.InvalidArgument, match=r"seq_lens: needed at least q_len \(70\)"):
        kk.paged_prefill(batch.q, kv, batch.cu_seqlens_q)
    unaligned = make_batch([(10, 64)])
    selection = random_selection(unaligned, 2)
    with pytest.raises(kk.InvalidArgument, match="multiple of 64"):
        kk.block_sparse_prefill(unaligned.q, unaligned.kv, unaligned.cu_seqlens_q, selection)


def test_named_implementation_never_falls_back() -> None:
    batch = make_batch([(0, 1)])
    with pytest.raises(kk.UnknownName, match="expected 'auto' or one of"):
        kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl="cuda")
    with pytest.raises(kk.KernelUnavailable, match="no_such_operation"):
        kk.dispatch.implementation("no_such_operation", "reference", batch.q)


def test_eager_oracle_itself_is_causal_softmax() -> None:
    batch = make_batch([(0, 5)])
    q = batch.q.transpose(0, 1)[None]
    want = torch.nn.functional.scaled_dot_product_attention(
        q, batch.keys[0][None], batch.values[0][None], is_causal=True, enable_gqa=True
    )
    got, _ = eager(batch, batch.q, [5], None, EXACT)
    torch.testing.assert_close(got, want[0].transpose(0, 1))
