"""Contract 1: the same tokens whichever way a request is served; contract 2: the same bytes on both sides."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrelay import SamplingParams
from tiny_engine import assert_all_blocks_home, greedy, once, prompts, tiny_llm, until_preempted

LENGTHS = (1, 2, 64, 65, 66, 129, 300)
MAX_TOKENS = 140

WAYS: dict[str, dict[str, Any]] = {
    "1P1D": {},
    "2P2D": {"prefill_workers": 2, "decode_workers": 2},
    "2P2D-round-robin": {"prefill_workers": 2, "decode_workers": 2, "policy": "round_robin"},
    "chunks-of-64": {"prefill_chunk_tokens": 64},
    "chunks-of-256": {"prefill_chunk_tokens": 256},
    "whole-prompts": {"prefill_chunk_tokens": None},
    "one-at-a-time": {"max_num_seqs": 1},
    "preempted": {"num_kv_blocks": 8},
    "colocated": {"mode": "colocated"},
    "colocated-chunks-of-64": {"mode": "colocated", "prefill_chunk_tokens": 64},
    "colocated-preempted": {"mode": "colocated", "num_kv_blocks": 8},
    "steps": {"model_impl": "torch", "cuda_graphs": "uncaptured"},
    "steps-colocated-preempted": {
        "model_impl": "torch",
        "cuda_graphs": "uncaptured",
        "mode": "colocated",
        "num_kv_blocks": 8,
        "max_num_seqs": 3,
    },
    "shm": {"transport": "shm"},
    "nixl": {"transport": "nixl", "prefill_chunk_tokens": 64},
    "shm-2P2D-preempted": {
        "transport": "shm",
        "prefill_workers": 2,
        "decode_workers": 2,
        "num_kv_blocks": 7,
        "prefill_chunk_tokens": 64,
    },
}


@cache
def _transformers(directory: Path) -> list[list[int]]:
    """What transformers generates greedily, one prompt at a time."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    expected = []
    for prompt in prompts(*LENGTHS):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False)
        expected.append(output[0, len(prompt) :].tolist())
    return expected


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_equal_those_of_transformers(tiny_directory: Path, way: str) -> None:
    if way == "nixl":
        pytest.importorskip("nixl", reason="extra nixl")
    with tiny_llm(tiny_directory, **WAYS[way]) as llm:
        serve = until_preempted if "preempted" in way else once
        outputs, *tries = serve(llm, prompts(*LENGTHS), greedy(MAX_TOKENS))
        again = llm.generate(prompts(*LENGTHS), greedy(MAX_TOKENS))
        report = llm.report()
        assert_all_blocks_home(llm)
        leaked = llm.engine.close()
    assert [output.token_ids for output in outputs] == _transformers(tiny_directory)
    for later in (*tries, again):
        assert [output.token_ids for output in later] == _transformers(tiny_directory), "after a prefix hit"
    assert [output.num_cached_tokens for output in outputs] == [0] * len(LENGTHS)
    if "num_kv_blocks" not in WAYS[way] and "2P2D" not in way:
        assert [output.num_cached_tokens for output in again] == [(n - 1) // 64 * 64 for n in LENGTHS]
    assert [output.finish_reason for output in outputs] == ["length"] * len(LENGTHS)
    assert set(leaked.values()) == {0}
    assert len(leaked) == len(report.workers)


def test_seeded_samples_are_equal_in_every_way(tiny_directory: Path) -> None:
    params = [
        SamplingParams(max_tokens=24, seed=index, temperature=0.9, top_p=0.95, ignore_eos=True)
        for index in range(len(LENGTHS))
    ]
    results = {}
    for way in ("1P1D", "2P2D", "chunks-of-64", "preempted", "colocated", "one-at-a-time", "steps"):
        with tiny_llm(tiny_directory, **WAYS[way]) as llm:
            results[way] = [output.token_ids for output in llm.generate(prompts(*LENGTHS), params)]
    assert len({str(tokens) for tokens in results.values()}) == 1, results
    assert len({str(tokens) for tokens in results["1P1D"]}) == len(LENGTHS)


def test_unseeded_samples_differ(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, mode="colocated") as llm:
        first, second = llm.generate([prompts(20)[0]] * 2, SamplingParams(max_tokens=24, ignore_eos=True))
    assert first.token_ids != second.token_ids


def test_bytes_moved_are_those_of_the_prefilled_blocks(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory) as llm:
        llm.generate(prompts(*LENGTHS), greedy(2))
        report = llm.report()
        layout = llm.engine.spec
    num_blocks = sum(-(-(length - 1) // 64) for length in LENGTHS)
    block_bytes = layout.num_layers * 2 * layout.num_kv_heads * layout.head_dim * 64 * 4
    assert report.kv_bytes_moved == num_blocks * block_bytes
    assert report.phases["transfer"].num_tokens == num_blocks * 64
    assert report.phases["prefill"].num_tokens == sum(length - 1 for length in LENGTHS)
    assert report.phases["decode"].num_tokens == 2 * len(LENGTHS)


def test_colocated_moves_nothing(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, mode="colocated") as llm:
        llm.generate(prompts(*LENGTHS), greedy(2))
        assert llm.report().kv_bytes_moved == 0
