"""Properties of selection and attention together, over random shapes and settings, on every CPU backend."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvrelay_kernels as kk
from kernel_batches import TRITON, Batch, assert_accurate, decode_queries, make_batch
from kvrelay_kernels.cpu.native.library import instruction_set

if TRITON:
    pytest.skip("properties hold on the CPU implementations, which are quick", allow_module_level=True)

IMPLS = ["reference", "cpu-torch", *(["cpu-native"] if instruction_set() else [])]
HEADS = [(1, 1), (2, 2), (4, 2), (6, 2), (5, 1), (8, 1)]

drawn = given(
    impl=st.sampled_from(IMPLS),
    heads=st.sampled_from(HEADS),
    samples=st.sampled_from([1, 2, 3, 5, 64]),
    siblings=st.sampled_from([1, 2, 4]),
    tokens=st.integers(1, 64 * 14),
    seed=st.integers(0, 10**6),
)
few = settings(max_examples=10, deadline=None)


def configure(samples: int, siblings: int, budget: int = 5) -> kk.SelectionConfig:
    return kk.SelectionConfig(
        budget=budget, sampled_queries=samples, sibling_blocks=siblings, candidate_factor=1.0, beam_factor=1.0
    )


def sparse(
    q: torch.Tensor, kv: kk.PagedKV, cu: torch.Tensor, config: kk.SelectionConfig, impl: str
) -> tuple[kk.BlockSelection, torch.Tensor]:
    """Statistics, selection and attention of a batch: its lists and its output."""
    stats = kk.kv_block_stats(kv, impl=impl)
    out, _, chosen = kk.sparse_prefill(q, kv, cu, config, stats=stats, impl=impl)
    return chosen, out


def first_tokens(batch: Batch, count: int) -> tuple[torch.Tensor, kk.PagedKV, torch.Tensor]:
    lengths = torch.tensor([count], dtype=torch.int32)
    kv = replace(batch.kv, seq_lens=lengths, block_table=batch.kv.block_table[:1])
    return batch.q[:count], kv, torch.tensor([0, count], dtype=torch.int32)


@few
@drawn
def test_a_budget_of_all_blocks_is_dense(impl, heads, samples, siblings, tokens, seed) -> None:
    batch = make_batch([(0, tokens)], heads=heads, dtype=torch.float32, seed=seed)
    _, out = sparse(batch.q, batch.kv, batch.cu_seqlens_q, configure(samples, siblings, 14), impl)
    dense, _ = kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl=impl)
    torch.testing.assert_close(out, dense)


@few
@drawn
def test_what_follows_a_sibling_group_changes_nothing_in_it(
    impl, heads, samples, siblings, tokens, seed
) -> None:
    batch = make_batch([(0, tokens)], heads=heads, dtype=torch.float32, seed=seed)
    config, width = configure(samples, siblings), 64 * siblings
    keep = tokens // 2 // width * width
    if keep == 0:
        return
    _, whole = sparse(batch.q, batch.kv, batch.cu_seqlens_q, config, impl)
    _, alone = sparse(*first_tokens(batch, keep), config, impl)
    torch.testing.assert_close(whole[:keep], alone, rtol=0, atol=0)


@few
@drawn
def test_chunks_cut_at_sibling_groups_give_the_whole(impl, heads, samples, siblings, tokens, seed) -> None:
    batch = make_batch([(0, tokens)], heads=heads, dtype=torch.float32, seed=seed)
    config, width = configure(samples, siblings), 64 * siblings
    cut = tokens // 2 // width * width
    _, whole = sparse(batch.q, batch.kv, batch.cu_seqlens_q, config, impl)
    stats = kk.KVBlockStats.empty(batch.kv.k_pages)
    parts = []
    for first, last in ((0, cut), (cut, tokens)):
        kv = replace(batch.kv, seq_lens=torch.tensor([last], dtype=torch.int32))
        cu = torch.tensor([0, last - first], dtype=torch.int32)
        kk.update_kv_block_stats(stats, kv, cu[1:], impl=impl)
        q = batch.q[first:last]
        parts.append(kk.sparse_prefill(q, kv, cu, config, stats=stats, impl=impl)[0])
    torch.testing.assert_close(torch.cat(parts), whole)


@few
@drawn
def test_a_sequence_does_not_notice_its_batch(impl, heads, samples, siblings, tokens, seed) -> None:
    batch = make_batch([(0, tokens), (64, 70), (0, 0)], heads=heads, dtype=torch.float32, seed=seed)
    config = configure(samples, siblings)
    together, out = sparse(batch.q, batch.kv, batch.cu_seqlens_q, config, impl)
    alone, out_alone = sparse(*first_tokens(batch, tokens), config, impl)
    used = -(-tokens // 64)
    assert torch.equal(together.indices[:used], alone.indices[:used])
    torch.testing.assert_close(out[:tokens], out_alone)


@few
@drawn
def test_list_order_and_constant_values(impl, heads, samples, siblings, tokens, seed) -> None:
    batch = make_batch([(0, tokens)], heads=heads, dtype=torch.float32, seed=seed)
    chosen, out = sparse(batch.q, batch.kv, batch.cu_seqlens_q, configure(samples, siblings), impl)
    backwards = replace(chosen, indices=chosen.indices.clone())
    for slot, head in torch.nonzero(chosen.counts).tolist():
        count = int(chosen.counts[slot, head])
        backwards.indices[slot, head, :count] = chosen.indices[slot, head, :count].flip(0)
    again, _ = kk.block_sparse_prefill(batch.q, batch.kv, batch.cu_seqlens_q, backwards, impl=impl)
    torch.testing.assert_close(again, out)
    kv = replace(batch.kv, v_pages=torch.where(batch.kv.v_pages.isnan(), torch.nan, 3.0))
    flat, _ = kk.block_sparse_prefill(batch.q, kv, batch.cu_seqlens_q, chosen, impl=impl)
    torch.testing.assert_close(flat, torch.full_like(flat, 3.0))


@few
@drawn
def test_decode_is_the_last_row_of_prefill(impl, heads, samples, siblings, tokens, seed) -> None:
    batch = make_batch([(0, tokens)], heads=heads, dtype=torch.float32, seed=seed)
    policy = kk.AttendPolicy(
        selection=configure(samples, siblings, 14), crossover_tokens=64 * 7, impl=impl, scale=0.3
    )
    stats = kk.kv_block_stats(batch.kv, impl=impl)
    sizes = {"max_seq_len": tokens, "stats": stats}
    whole = kk.attend(batch.q, batch.kv, batch.cu_seqlens_q, policy, **sizes)
    last = kk.attend(batch.q[-1:], batch.kv, None, policy, **sizes)
    assert last.path == whole.path == ("dense" if tokens < 64 * 7 else "sparse")
    torch.testing.assert_close(last.out, whole.out[-1:])
    unscaled = kk.attend(batch.q[-1:] * 0.3, batch.kv, None, replace(policy, scale=1.0), **sizes)
    torch.testing.assert_close(last.out, unscaled.out)


@pytest.mark.parametrize("impl", ["reference", "cpu-torch"])
def test_half_precision_is_as_accurate_as_plain_eager(impl: str) -> None:
    batch = make_batch([(0, 65), (64, 130)], dtype=torch.float16)
    got = kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl=impl)
    assert_accurate(got, batch, batch.q, batch.q_lens, None)
    q = decode_queries(batch)
    assert_accurate(kk.paged_decode(q, batch.kv, impl=impl), batch, q, [1, 1], None)


def test_block_mask_carries_the_lists_and_runs_in_flex_attention() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    batch = make_batch([(0, 64 * 5 + 9)], dtype=torch.float32)
    tokens = batch.q.shape[0]
    keys, values = batch.keys[0][None], batch.values[0][None]
    chosen, _ = sparse(batch.q, batch.kv, batch.cu_seqlens_q, configure(2, 4, 6), "reference")
    mask = chosen.to_block_mask(0, 4, tokens, tokens)
    for head in range(4):
        for slot in range(6):
            count = int(chosen.counts[slot, head // 2])
            assert int(mask.kv_num_blocks[0, head, slot]) == count
            listed = chosen.indices[slot, head // 2, :count]
            assert torch.equal(mask.kv_indices[0, head, slot, :count].int(), listed)
    q = batch.q.transpose(0, 1)[None].contiguous()
    got = flex_attention(q, keys, values, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    dense, _ = kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl="reference")
    torch.testing.assert_close(got, dense)  # a budget of all: eager FlexAttention reads the mask alone


@pytest.mark.slow
def test_compiled_flex_attention_over_our_lists_is_our_sparse_attention() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    batch = make_batch([(0, 64 * 12)], dtype=torch.float32)
    chosen, want = sparse(batch.q, batch.kv, batch.cu_seqlens_q, configure(2, 4), "reference")
    q = batch.q.transpose(0, 1)[None].contiguous()
    mask = chosen.to_block_mask(0, 4, 64 * 12, 64 * 12)
    run = torch.compile(flex_attention, dynamic=False)
    got = run(q, batch.keys[0][None], batch.values[0][None], block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(got[0].transpose(0, 1), want)
