"""Arithmetic of the quality and long-context benchmarks: answers lie in prompts, like meets like."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import long_context
import quality_levers
import quality_report
from kvrelay.models.tokenizer import Tokenizer
from kvrelay.sparse import GROUP_TOKENS, AttentionUse
from quality_tasks import DEPTHS, RULER, TASKS, Writer, score


@pytest.fixture(scope="module")
def writer(tiny_directory: Path) -> Writer:
    return Writer(Tokenizer.from_directory(tiny_directory))


@pytest.mark.parametrize("task", TASKS)
def test_a_context_is_whole_groups_and_holds_every_answer(
    writer: Writer, tiny_directory: Path, task: str
) -> None:
    sample = writer.sample(task, 8000, 3)
    text = Tokenizer.from_directory(tiny_directory).decode(sample.context)
    assert len(sample.context) == 8000 // GROUP_TOKENS * GROUP_TOKENS
    for question in sample.questions:
        for expected in question.expected:
            assert expected in text, (task, question.label)
    assert writer.sample(task, 8000, 3) == sample
    assert writer.sample(task, 8000, 4) != sample


def test_needles_lie_at_their_depths(writer: Writer, tiny_directory: Path) -> None:
    sample = writer.sample("needle", 16384, 0)
    text = Tokenizer.from_directory(tiny_directory).decode(sample.context)
    for depth, question in zip(DEPTHS, sample.questions, strict=True):
        at = text.index(f"is {question.expected[0]}.") / len(text)
        assert question.label == str(depth)
        assert abs(at - depth / 100) < 0.06


def test_scores_are_shares_of_the_expected_strings() -> None:
    assert score(" ABC and def", ["abc", "def", "xyz", "DEF"]) == 0.75


def cell(part: str, settings: str, length: int, seed: int, **scores: float) -> Any:
    return SimpleNamespace(
        part=part,
        settings=settings,
        length=length,
        seed=seed,
        scores=scores,
        continued=[1, 2, 3] if settings == "dense" else [1, 2, 4],
        use=AttentionUse(1, 1, 4),
    )


def test_a_row_stands_beside_dense_on_the_same_cells() -> None:
    cells = [
        cell("needle", "dense", 1024, 0, a=1.0, b=1.0),
        cell("needle", "sparse", 1024, 0, a=0.0, b=1.0),
        cell("needle", "dense", 2048, 0, a=0.5),  # sparse has not got that far
        cell("text", "dense", 6144, 0, nll=2.0, top1=1.0, kl=0.0),
        cell("text", "sparse", 6144, 0, nll=2.1, top1=0.9, kl=0.1),
        cell(RULER[0], "dense", 4096, 0, a=1.0),
    ]
    grouped: dict[str, dict[Any, Any]] = {}
    for one in cells:
        grouped.setdefault(one.settings, {})[one.part, one.length, one.seed] = one
    dense, sparse = (quality_report._row(grouped, name) for name in ("dense", "sparse"))
    assert (dense["needle"], dense["num_needle_questions"]) == (0.75, 3)
    assert (sparse["needle"], sparse["needle_of_dense"], sparse["num_needle_questions"]) == (0.5, 1.0, 2)
    assert sparse["needle_standard_error"] == pytest.approx((0.25 / 2) ** 0.5)
    assert (dense["ruler"], sparse["ruler"], sparse["ruler_standard_error"]) == (1.0, None, None)
    assert sparse["ppl_ratio"] == pytest.approx(1.10517, abs=1e-4)
    assert (sparse["greedy_match"], sparse["share_of_pairs"], sparse["tokens_per_query"]) == (2, 0.25, 1.0)
    assert quality_report._needles(grouped["dense"]) == {
        "1024": {"asked_per_depth": 1, "a": 1.0, "b": 1.0},
        "2048": {"asked_per_depth": 1, "a": 0.5},
    }
    assert quality_report._ruler(grouped["dense"]) == {f"{RULER[0]} 4096": {"score": 1.0, "questions": 1}}


def test_a_lever_reads_what_it_says() -> None:
    """Two heads of a group that look at blocks 1 and 2, rows 256 to 383 of 384 keys: own blocks 4 and 5."""
    weights = torch.zeros(1, 2, 128, 384)
    weights[0, 0, :, 64], weights[0, 1, :, 128], weights[..., 0] = 0.6, 0.7, 0.2
    lever = quality_levers.Lever(budget=3, local=1)

    def read(**changes: Any) -> list[list[int]]:
        kept = quality_levers.chosen(weights, 256, replace(lever, **changes))
        return [kept[0, head, row].nonzero().flatten().tolist() for head in (0, 1) for row in (0, 127)]

    assert read() == [[0, 2, 4], [0, 2, 5]] * 2
    assert read(per_head=True) == [[0, 1, 4], [0, 1, 5], [0, 2, 4], [0, 2, 5]]
    assert read(top_p=0.1) == [[0, 4], [0, 5]] * 2
    assert read(budget=4) == [[0, 1, 2, 4], [0, 1, 2, 5]] * 2
    kept = quality_levers.chosen(weights, 256, lever)
    assert torch.allclose(
        quality_levers.with_tail(weights, kept, lever)[0, 0, 0, [0, 64]], torch.tensor([1.0, 0])
    )
    tail = quality_levers.with_tail(weights, kept, replace(lever, tail=True))[0, 0, 0]
    assert torch.allclose(tail[[0, 64, 127]], torch.tensor([0.25, 0.75 / 64, 0.75 / 64]))


def test_a_prefill_is_the_integral_of_its_chunks() -> None:
    """A dense chunk of 512 costs a + b * position: the trapezoids are exact for that."""
    values = {end: 1.0 + end / 512 for end in (512, 2048, 8192)}
    exact = sum(1.0 + end / 512 for end in range(512, 8193, 512))
    assert long_context._integral(values, 8192) / 512 == pytest.approx(exact, rel=0.07)
    step = long_context.Step(dense_layer_s=2.0, sparse_layer_s=0.5, rest_s=3.0)
    assert step.total_s(30, 30) == 63.0
    assert step.total_s(30, 2) == 3.0 + 4.0 + 14.0
