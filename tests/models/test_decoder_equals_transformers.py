from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, ROPES, VOCAB, DenseSequences, greedy, saved, tiny_model

from kvrelay.models.decoder import Decoder
from kvrelay.models.loading import load_model
from kvrelay.models.native import NativeDecoder
from kvrelay_kernels.cpu.native import library

NUM_PROMPT, NUM_NEW = 70, 40  # past the 64 original positions of the scaled ropes


native = pytest.param(
    "native", marks=pytest.mark.skipif(library.instruction_set() is None, reason=library.HOW_TO_BUILD)
)
IMPLS = ["torch", native]


def prompt(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def reference_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]


def reference_greedy(model: Any, token_ids: list[int], num_tokens: int) -> list[int]:
    out = model.generate(
        torch.tensor([token_ids]),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(token_ids) :].tolist()


def load(
    model: Any, directory: Path, max_shard_size: str = "1GB", impl: str = "torch"
) -> Decoder | NativeDecoder:
    decoder = load_model(saved(model, directory, max_shard_size), "cpu", torch.float32, impl)
    assert decoder.impl.startswith(impl)
    return decoder


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal(architecture: str, rope: str, impl: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, rope)
    decoder = load(model, tmp_path, impl=impl)
    token_ids = prompt(NUM_PROMPT + NUM_NEW)
    [logits] = DenseSequences(decoder, 1).forward([(0, token_ids)])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference_logits(model, token_ids), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rope", ["default", "llama3", "yarn"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_generate(architecture: str, rope: str, impl: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, rope)
    prompts = [prompt(NUM_PROMPT, seed=1), prompt(5, seed=2)]
    outputs = greedy(load(model, tmp_path, impl=impl), prompts, NUM_NEW)
    assert outputs == [reference_greedy(model, token_ids, NUM_NEW) for token_ids in prompts]
    assert all(len(set(output)) > 5 for output in outputs), "the model repeats itself: the test proves little"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2-untied"])
def test_sharded_equals_unsharded(architecture: str, impl: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    whole = load(model, tmp_path / "whole", impl=impl)
    sharded = load(model, tmp_path / "sharded", "60KB", impl)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    [expected], [logits] = (
        DenseSequences(decoder, 1).forward([(0, prompt(9))]) for decoder in (whole, sharded)
    )
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_and_neighbours_do_not_matter(impl: str, tmp_path: Path) -> None:
    decoder = load(tiny_model("qwen3"), tmp_path, impl=impl)
    first, second = prompt(33, seed=3), prompt(17, seed=4)
    [alone] = DenseSequences(decoder, 1).forward([(0, first)])
    together = DenseSequences(decoder, 2)
    head, _ = together.forward([(0, first[:20]), (1, second[:9])])
    _, tail = together.forward([(1, second[9:]), (0, first[20:])])
    torch.testing.assert_close(torch.cat((head, tail)), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_reach_attend_and_hidden(dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = load_model(saved(tiny_model("qwen3"), tmp_path), "cpu", dtype, "torch")
    seen: list[tuple[torch.dtype, torch.Size]] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.extend((x.dtype, x.shape) for x in (q, k, v))
        return torch.zeros_like(q)

    hidden = decoder.forward(torch.tensor([5, 6]), torch.tensor([0, 1]), attend)
    assert hidden.dtype == decoder.dtype == dtype
    assert hidden.shape == (2, 64)
    assert decoder.logits(hidden[-1:]).shape == (1, VOCAB)
    assert decoder.logits(hidden).dtype == torch.float32
    assert seen[:3] == [(dtype, (2, 4, 32)), (dtype, (2, 2, 32)), (dtype, (2, 2, 32))]


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_is_close_to_transformers(impl: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    decoder = load_model(saved(model, tmp_path), "cpu", torch.bfloat16, impl)
    token_ids = prompt(40)
    exact = reference_logits(model, token_ids)
    [logits] = DenseSequences(decoder, 1).forward([(0, token_ids)])
    theirs = reference_logits(model.to(torch.bfloat16), token_ids).float()
    assert (logits - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("impl", IMPLS)
def test_kv_only_attends_in_every_layer_as_always_and_stops(impl: str, tmp_path: Path) -> None:
    decoder = load(tiny_model("qwen2"), tmp_path, impl=impl)
    token_ids, positions = torch.tensor(prompt(9)), torch.arange(9)
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for kv_only, rows in seen.items():

        def attend(layer: int, q: torch.Tensor, *kv: torch.Tensor, rows: Any = rows) -> torch.Tensor:
            assert layer == len(rows)
            rows.append(torch.cat((q, *kv), dim=1))
            return q

        hidden = decoder.forward(token_ids, positions, attend, kv_only=kv_only)
        assert hidden.shape == (0 if kv_only else 9, 64)
    assert len(seen[True]) == decoder.spec.num_layers
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))
