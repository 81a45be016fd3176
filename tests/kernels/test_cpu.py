"""The CPU implementation: which backend runs, every instruction set built, threads, refusals."""

import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kvrelay_kernels as kk
from kernel_batches import (
    ABSURD,
    Batch,
    assert_accurate,
    decode_queries,
    make_batch,
    poison_unselected,
    random_selection,
)
from kvrelay_kernels.cpu.native import library
from kvrelay_kernels.cpu.sum_of_weights import RELATIVE_ERROR, sum_of_weights
from kvrelay_kernels.reference.query_groups import block_masses as exact_masses
from kvrelay_kernels.reference.query_groups import mean_over_rows, query_groups
from kvrelay_kernels.reference.sequences import iterate_chunks

EDGES = [(0, 0), (0, 1), (0, 2), (0, 63), (64, 64), (0, 66), (128, 129), (192, 1), (256, 0)]
built = pytest.mark.skipif(library.instruction_set() is None, reason=f"not built: {library.HOW_TO_BUILD}")


def test_backend_says_what_runs() -> None:
    assert kk.cpu_backend(torch.float64) == "torch"
    assert kk.cpu_backend(torch.float32, head_dim=20) == "torch"
    found = library.instruction_set()
    assert kk.cpu_backend(torch.bfloat16) == (f"native-{found}" if found else "torch")
    taken = kk.chosen_implementation("paged_decode", torch.zeros(1, 1, 64))
    assert taken == ("cpu-native" if found else "cpu-torch")


def test_without_the_extension_cpu_is_torch_and_native_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_load", lambda: None)
    batch = make_batch([(0, 70)], dtype=torch.float32)
    got = kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl="cpu")
    assert_accurate(got, batch, batch.q, batch.q_lens, None)
    assert kk.cpu_backend() == "torch"
    with pytest.raises(kk.KernelUnavailable, match=r"not built.*build_ext"):
        kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl="cpu-native")


@built
def test_a_library_of_other_sources_than_the_checkouts_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(library.__file__).with_name("kernels_generic.so")
    assert library.load_from(path) is not None
    monkeypatch.setattr(library, "CSRC", shutil.copytree(library.CSRC, tmp_path / "csrc"))
    assert library.load_from(path) is not None
    (tmp_path / "csrc/merge.h").write_text((tmp_path / "csrc/merge.h").read_text() + "// changed\n")
    assert library.load_from(path) is None
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)
    batch = make_batch([(0, 70)], dtype=torch.float32)
    with pytest.raises(kk.KernelUnavailable, match=r"not from these sources; install again"):
        kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl="cpu-native")
    monkeypatch.setattr(library, "CSRC", tmp_path / "none")
    assert library.load_from(path) is not None, "an installed package has no sources"


@pytest.mark.parametrize("temperature", [0.02, 0.7, 1.0, 50.0])
@pytest.mark.parametrize("count", [1, 7, 8, 511, 49_152 + 3])
@pytest.mark.parametrize("instruction_set", [*library.INSTRUCTION_SETS, None])
def test_sums_of_weights_are_within_their_error(
    instruction_set: str | None, count: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(library.__file__).with_name(f"kernels_{instruction_set}.so")
    loaded = library.load_from(path) if path.exists() else None
    if instruction_set is not None and (loaded is None or not loaded.kvr_supported()):
        pytest.skip("not for this processor")
    monkeypatch.setattr(library, "_load", lambda: loaded and (instruction_set, loaded))
    for scale in (0.0, 0.1, 4.0, 30.0):
        below = np.random.default_rng(count).standard_normal(count).astype(np.float32) * np.float32(scale)
        below -= below.max()
        below[1:3] = -np.inf
        exact = np.exp(below.astype(np.float64) / temperature).sum()
        assert sum_of_weights(below, temperature) == pytest.approx(exact, rel=RELATIVE_ERROR / 2)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("instruction_set", library.INSTRUCTION_SETS)
def test_every_instruction_set_group_and_head_dim(
    instruction_set: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(library.__file__).with_name(f"kernels_{instruction_set}.so")
    loaded = library.load_from(path) if path.exists() else None
    if loaded is None or not loaded.kvr_supported():
        pytest.skip("not for this processor")
    monkeypatch.setattr(library, "_load", lambda: (instruction_set, loaded))
    for heads, head_dim in (((1, 1), 96), ((16, 1), 64), ((6, 2), 256), ((7, 1), 8), ((8, 2), 72)):
        assert_all_operations_accurate(make_batch(EDGES, heads=heads, head_dim=head_dim, dtype=dtype))


def first_heads(batch: Batch) -> Batch:
    """The first query head of each group alone: strided queries, a list for each."""
    return replace(batch, q=batch.q[:, :: batch.q.shape[1] // batch.kv.num_kv_heads])


def sparse_prefill_by_head(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, kk.BlockSelection]:
    """Selection by all rows, and attention, in one call."""
    stats = kk.kv_block_stats(batch.kv, impl="cpu-native")
    config = kk.SelectionConfig(budget=4, sampled_queries=64, candidate_factor=1.5, top_p=0.9)
    return kk.sparse_prefill(batch.q, batch.kv, batch.cu_seqlens_q, config, stats=stats, impl="cpu-native")


def assert_all_operations_accurate(batch: Batch) -> None:
    """Dense and sparse, prefill and decode, on outputs and unread slots full of NaN."""
    impl, ones = "cpu-native", [1] * batch.kv.batch
    got = kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl=impl)
    assert_accurate(got, batch, batch.q, batch.q_lens, None)
    selection = random_selection(batch, 3)
    poisoned = poison_unselected(batch, selection).kv
    got = kk.block_sparse_prefill(batch.q, poisoned, batch.cu_seqlens_q, selection, impl=impl)
    assert_accurate(got, batch, batch.q, batch.q_lens, selection)
    alone = first_heads(batch)
    *got, selection = sparse_prefill_by_head(alone)
    assert_accurate(tuple(got), alone, alone.q, alone.q_lens, selection)
    q = decode_queries(batch)
    assert_accurate(kk.paged_decode(q, batch.kv, impl=impl), batch, q, ones, None)
    selection = random_selection(batch, 3, decode=True)
    poisoned = poison_unselected(batch, selection).kv
    assert_accurate(kk.block_sparse_decode(q, poisoned, selection, impl=impl), batch, q, ones, selection)


@pytest.fixture(autouse=True)
def outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: empty(*size, **kind).fill_(torch.nan))


@built
def test_strided_channels_and_tables_are_read_right() -> None:
    batch = make_batch([(64, 70), (0, 3)], dtype=torch.float32)
    k_pages = batch.kv.k_pages.repeat_interleave(2, -1)[..., ::2]
    table = batch.kv.block_table.repeat_interleave(2, -1)[..., ::2]
    q = batch.q.repeat_interleave(2, -1)[..., ::2]
    kv = replace(batch.kv, k_pages=k_pages, block_table=table)
    got = kk.paged_prefill(q, kv, batch.cu_seqlens_q, impl="cpu-native")
    assert_accurate(got, batch, q, batch.q_lens, None)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tree_agrees_with_the_reference_but_for_ties(dtype: torch.dtype) -> None:
    batch = make_batch([(0, 64 * 90 + 5), (64 * 30, 70)], heads=(6, 2), dtype=dtype)
    config = kk.SelectionConfig(budget=6, candidate_factor=2.0)
    stats = kk.kv_block_stats(batch.kv, impl="reference")
    want, got = (
        kk.select_blocks(batch.q, batch.kv, config, cu_seqlens_q=batch.cu_seqlens_q, stats=stats, impl=impl)
        for impl in ("reference", "cpu-native")
    )
    assert torch.equal(want.counts, got.counts)
    assert torch.equal(want.cu_q_blocks, got.cu_q_blocks)
    different = (want.indices != got.indices).any(-1)
    assert different.float().mean() <= 0.02, "more than ties"
    apart = torch.tensor([mass_apart(batch, config, want, got)])
    assert (apart <= 1e-4).all()


def mass_apart(batch: Batch, config: kk.SelectionConfig, *chosen: kk.BlockSelection) -> float:
    """Largest difference in exact sampled mass between two selections of the same queries."""
    worst = 0.0
    for chunk in iterate_chunks(batch.kv, batch.cu_seqlens_q, batch.q.shape[0]):
        slot = int(chosen[0].cu_q_blocks[chunk.sequence])
        rows = batch.q[chunk.first_row : chunk.first_row + chunk.q_len]
        for group in query_groups(chunk, rows, config.sibling_blocks):
            own = group.own_blocks
            every = torch.arange(int(own[-1]) + 1).expand(2, -1)
            q, positions = group.sampled(config.sampled_queries)
            masses = mean_over_rows(
                exact_masses(q, positions, chunk.view, every, batch.q.shape[2] ** -0.5), len(own)
            )
            for i in range(len(own)):
                lists = [one.indices[slot + i].long() for one in chosen]
                held = [(masses[:, i].gather(1, n.clamp(min=0)) * (n >= 0)).sum(1) for n in lists]
                worst = max(worst, (held[0] - held[1]).abs().max().item())
            slot += len(own)
    return worst


@built
def test_many_threads_and_two_callers_at_once_give_the_results_of_one() -> None:
    batch = make_batch([(0, 64 * 40 + 3), (64, 130)], heads=(8, 2), dtype=torch.float32)
    want = run_everything(batch)
    torch.set_num_threads(4)
    with ThreadPoolExecutor(4) as callers:
        for got in [run_everything(batch), *callers.map(lambda _: run_everything(batch), range(8))]:
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@built
def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    # small enough for torch itself to stay off its OpenMP threads, which do not survive a fork
    batch = make_batch([(0, 100)], dtype=torch.float32)
    torch.set_num_threads(3)
    want, _ = kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl="cpu-native")
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        got, _ = kk.paged_prefill(batch.q, batch.kv, batch.cu_seqlens_q, impl="cpu-native")
        os._exit(0 if bool((got.numpy() == want.numpy()).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def run_everything(batch: Batch) -> list[torch.Tensor]:
    stats = kk.kv_block_stats(batch.kv, impl="cpu-native")
    config = kk.SelectionConfig(budget=6)
    arguments = (batch.q, batch.kv, batch.cu_seqlens_q)
    selection = kk.select_blocks(
        batch.q, batch.kv, config, cu_seqlens_q=batch.cu_seqlens_q, stats=stats, impl="cpu-native"
    )
    q = decode_queries(batch)
    return [
        *kk.paged_prefill(*arguments, impl="cpu-native"),
        *kk.block_sparse_prefill(*arguments, selection, impl="cpu-native"),
        *kk.paged_decode(q, batch.kv, impl="cpu-native"),
        *sparse_prefill_by_head(first_heads(batch))[:2],
        selection.indices,
    ]


@built
def test_more_blocks_than_weights_are_kept_for_give_the_same() -> None:
    """Each query block ranks all that it sees, 257 to 260 of them: no weights are kept."""
    batch = make_batch([(64 * 256, 4 * 64)], heads=(1, 1), dtype=torch.float32)
    config = kk.SelectionConfig(budget=260, sampled_queries=64, top_p=0.4)
    stats = kk.kv_block_stats(batch.kv, impl="cpu-native")
    *got, selection = kk.sparse_prefill(
        batch.q, batch.kv, batch.cu_seqlens_q, config, stats=stats, impl="cpu-native"
    )
    assert 0 < selection.counts[:4].max() < 200
    assert_accurate(tuple(got), batch, batch.q, batch.q_lens, selection)


@built
def test_native_refuses_what_the_reference_refuses() -> None:
    batch = make_batch([(0, 70)], dtype=torch.float32)
    q, kv, bounds = batch.q, batch.kv, batch.cu_seqlens_q
    table = replace(kv, block_table=torch.full_like(kv.block_table, ABSURD))
    with pytest.raises(kk.InvalidArgument, match="block_table: needed pages below"):
        kk.paged_prefill(q, table, bounds, impl="cpu-native")
    with pytest.raises(kk.InvalidArgument, match="block_table: needed pages below"):
        kk.kv_block_stats(table, impl="cpu-native")
    with pytest.raises(kk.InvalidArgument, match=r"seq_lens: needed at least q_len \(70\)"):
        kk.paged_prefill(q, replace(kv, seq_lens=kv.seq_lens - 1), bounds, impl="cpu-native")
    with pytest.raises(kk.InvalidArgument, match="cu_seqlens_q: needed ascending"):
        kk.paged_prefill(q, kv, bounds * 2, impl="cpu-native")
    selection = random_selection(batch, 2)
    outside = replace(selection, indices=selection.indices + 2)
    with pytest.raises(kk.InvalidArgument, match="selection: needed blocks of their own sequence"):
        kk.block_sparse_prefill(q, kv, bounds, outside, impl="cpu-native")
    unaligned = make_batch([(10, 64)], dtype=torch.float32)
    with pytest.raises(kk.InvalidArgument, match="multiple of 64"):
        kk.block_sparse_prefill(
            unaligned.q,
            unaligned.kv,
            unaligned.cu_seqlens_q,
            random_selection(unaligned, 2),
            impl="cpu-native",
        )
