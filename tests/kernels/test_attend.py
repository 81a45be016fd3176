"""The dispatcher, the crossover, the cost model, the imports and the transformers integration."""

import subprocess
import sys
import time

import pytest
import torch

import kvrelay_kernels as kk
from kernel_batches import make_batch


def test_attend_is_dense_below_the_crossover_and_says_so() -> None:
    batch = make_batch([(0, 640)])
    stats = kk.kv_block_stats(batch.kv)
    for crossover, path in ((641, "dense"), (640, "sparse"), (None, "dense")):
        policy = kk.AttendPolicy(selection=kk.SelectionConfig(budget=3), crossover_tokens=crossover)
        got = kk.attend(batch.q, batch.kv, batch.cu_seqlens_q, policy, max_seq_len=640, stats=stats)
        assert got.path == path
        assert got.impl in kk.dispatch.IMPLEMENTATIONS
        assert (got.selection is None) == (path == "dense")


def test_crossover_is_where_sparse_stays_faster() -> None:
    dense_s = {1: 0.0, 2: 0.01, 4: 0.0, 8: 0.02, 16: 0.03}
    found = kk.measure_crossover(
        lambda n: time.sleep(dense_s[n]), lambda _: time.sleep(0.005), list(dense_s), 1
    )
    assert found == 8


@pytest.mark.parametrize(("kib", "reduction"), [(32, 2.28), (128, 8.24), (512, 32.1), (1024, 63.9)])
def test_ssa_model_and_ours_reach_the_published_reductions(kib: int, reduction: float) -> None:
    shape = kk.AttentionShape(num_q_heads=32, num_kv_heads=8, head_dim=128)
    config = kk.SelectionConfig(budget=128)
    flops = {
        method: kk.attention_cost(method, kib * 1024, shape, config).attention_flops
        for method in ("dense", "ssa", "tree")
    }
    assert flops["dense"] / flops["ssa"] == pytest.approx(reduction, rel=0.01)
    assert flops["dense"] / flops["tree"] == pytest.approx(reduction, rel=0.02)


def test_tree_selection_cost_grows_at_most_as_n_log_n_and_dsa_quadratically() -> None:
    shape = kk.AttentionShape(num_q_heads=32, num_kv_heads=8, head_dim=128)
    config = kk.SelectionConfig(budget=64)
    small, large = (kk.attention_cost("tree", n << 20, shape, config).selection_flops for n in (1, 8))
    assert large / small < 8 * 23 / 20
    small, large = (kk.attention_cost("dsa", n << 20, shape).selection_flops for n in (1, 8))
    assert large / small == pytest.approx(64, rel=0.01)


def test_pair_model_equals_the_lists() -> None:
    batch = make_batch([(0, 64 * 7 + 9)])
    config = kk.SelectionConfig(budget=4, selector="local")
    selection = kk.select_blocks(batch.q, batch.kv, config, cu_seqlens_q=batch.cu_seqlens_q)
    counted = selection.attended_pairs(batch.cu_seqlens_q.diff(), batch.kv.seq_lens)
    shape = kk.AttentionShape(num_q_heads=4, num_kv_heads=2, head_dim=64)
    assert kk.attention_cost("tree", 64 * 7 + 9, shape, config).attended_pairs * 2 == counted


def test_import_needs_neither_triton_nor_transformers() -> None:
    code = "import sys, kvrelay_kernels; print([m for m in ('triton', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": "kernels"},
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_transformers_model_with_a_full_budget_equals_eager(padding: str) -> None:
    transformers = pytest.importorskip("transformers")
    from kvrelay_kernels.integrations.transformers import register

    name = register(kk.SelectionConfig(budget=8))
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 50, (2, 200))
    mask = torch.ones_like(tokens)
    if padding != "none":
        mask[0, slice(0, 70) if padding == "left" else slice(130, 200)] = 0
    logits = {}
    for implementation in ("eager", name):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(tokens, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits[name], logits["eager"], atol=1e-4, rtol=1e-4)
