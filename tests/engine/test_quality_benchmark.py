"""Arithmetic of the quality and long-context benchmarks: answers lie in prompts, like meets like."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import long_context
import quality
import quality_levers
import quality_report
from kvrelay.models.loading import load_model
from kvrelay.models.tokenizer import Tokenizer
from kvrelay.sparse import GROUP_TOKENS, AttentionUse, SparseAttention
from quality_model import Reader
from quality_tasks import DEPTHS, NESTED, RULER, TASKS, WORDS, Writer, score
from real_model import smollm2_directory

LITTLE = SparseAttention(budget_tokens=128, local_blocks=1, dense_below_tokens=0, candidate_tokens=0)


@pytest.fixture(scope="module")
def writer(tiny_directory: Path) -> Writer:
    return Writer(Tokenizer.from_directory(tiny_directory))


@pytest.mark.parametrize("task", TASKS)
def test_a_context_is_whole_groups_and_holds_every_answer(
    writer: Writer, tiny_directory: Path, task: str
) -> None:
    """Of every length that is asked, before it ends: what a question is about has been read."""
    tokenizer, lengths = Tokenizer.from_directory(tiny_directory), (4000, 8000) if task in NESTED else (8000,)
    sample = writer.sample(task, lengths, 3)
    whole = [length // GROUP_TOKENS * GROUP_TOKENS for length in lengths]
    assert len(sample.context) == whole[-1]
    for length in whole:
        text = tokenizer.decode(sample.context[:length])
        asked = [question for question in sample.questions if question.length == length]
        assert len({question.label for question in asked}) == len(asked)
        for question in asked:
            for expected in question.expected:
                assert expected in text, (task, question.label)
    assert {question.length for question in sample.questions} == set(whole)
    assert writer.sample(task, lengths, 3) == sample
    assert writer.sample(task, lengths, 4) != sample


def test_needles_lie_at_their_depths_of_every_length(writer: Writer, tiny_directory: Path) -> None:
    """Five samples have one at each depth of the longest; at shorter lengths, those that lie within."""
    tokenizer, lengths = Tokenizer.from_directory(tiny_directory), (2048, 4096)
    depths = {length: list[int]() for length in lengths}
    for seed in range(5):
        sample = writer.sample("needle", lengths, seed)
        for length in lengths:
            text = tokenizer.decode(sample.context[:length])
            asked = [question for question in sample.questions if question.length == length]
            assert len(asked) == sum(text.count(f"number of {key} is ") for key in WORDS)
            for question in asked:
                at = 100 * text.index(f" is {question.expected[0]}.") / len(text)
                assert abs(at - int(question.label)) < 7, (length, question.label)
                depths[length].append(int(question.label))
    assert sorted(depths[4096]) == list(DEPTHS)
    assert 4 <= len(depths[2048]) <= 5


def test_a_round_asks_for_a_needle_at_every_depth_of_every_length() -> None:
    writer = Writer(Tokenizer.from_directory(smollm2_directory()))
    depths: dict[int, list[int]] = {}
    for job in quality.jobs(["needle"], 1):
        if job.settings == "dense":
            for question in writer.sample("needle", job.lengths, job.seed).questions:
                depths.setdefault(question.length, []).append(int(question.label))
    assert depths.keys() == {1024, 2048, 4096, 6144, 7424}
    assert all(sorted(found) == list(DEPTHS) for found in depths.values()), depths
    names = [cell.name for job in quality.jobs(["needle"], 5) for cell in job.cells()]
    assert len(names) == len(set(names)), "a name for each cell"


@pytest.mark.parametrize("sparse", [None, LITTLE])
def test_a_context_read_in_two_answers_as_one_read_whole(
    tiny_directory: Path, sparse: SparseAttention | None
) -> None:
    """Though it was asked half-way, where the questions' pages are those of the tokens that follow."""
    tokens = torch.randint(2, 250, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
    question = tokens[300:340]

    def reader() -> Reader:
        return Reader(load_model(tiny_directory, "cpu", torch.float32), 2048)

    whole, parted = reader(), reader()
    expected = [whole.read(tokens, sparse, 1024).shape[0], whole.ask(1024, [question], 16, sparse)]
    parted.read(tokens[:512], sparse, 512)
    half_way = parted.ask(512, [question, question], 16, sparse)
    assert [parted.read(tokens, sparse, 1024, 512).shape[0], parted.ask(1024, [question], 16, sparse)] == (
        expected
    )
    assert half_way[0] == half_way[1] != expected[1][0]
    assert parted.ask(1024, [], 16, sparse) == []


def test_settings_share_the_context_before_their_first_sparse_token(tiny_directory: Path) -> None:
    """What they share was read alike; the rest, and every answer, is as if nothing had been read before."""
    tokens = torch.randint(2, 250, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
    early = msgspec.structs.replace(LITTLE, budget_tokens=256, top_p=None)
    late = msgspec.structs.replace(early, budget_tokens=512)

    def answers(reader: Reader, sparse: SparseAttention | None, start: int) -> list[list[int]]:
        reader.read(tokens, sparse, 1024, start)
        return reader.ask(1024, [tokens[300:340]], 16, sparse)

    reader, chain = Reader(load_model(tiny_directory, "cpu", torch.float32), 2048), (None, late, early, late)
    found, starts = [], []
    for sparse in chain:
        starts.append(reader.shared_with_last(tokens, sparse, 768))
        found.append(answers(reader, sparse, starts[-1]))
    assert starts == [0, 512, 256, 256]
    assert reader.shared_with_last(tokens, LITTLE, 768) == 0
    assert reader.shared_with_last(tokens[::-1], early, 768) == 0
    assert [answers(reader, sparse, 0) for sparse in chain] == found
    assert found[0] != found[2], "early leaves out enough to answer otherwise"


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
        commit="",
    )


def test_a_row_stands_beside_dense_on_the_same_cells() -> None:
    cells = [
        cell("needle", "dense", 1024, 0, **{"5": 1.0, "15": 1.0}),
        cell("needle", "sparse", 1024, 0, **{"5": 0.0, "15": 1.0}),
        cell("needle", "dense", 2048, 0, **{"5": 0.5}),  # sparse has not got that far
        cell("text", "dense", 6144, 0, nll=2.0, top1=1.0, kl=0.0),
        cell("text", "sparse", 6144, 0, nll=2.1, top1=0.9, kl=0.1),
        *(cell(task, "dense", length, 0, a=1.0) for task in RULER for length in (4096, 7424)),
        *(cell(task, "sparse", 4096, 0, a=1.0) for task in RULER),  # not yet at both lengths
        *(cell(task, "some", length, 0, a=1.0) for task in RULER[1:] for length in (4096, 7424)),
    ]
    grouped: dict[str, dict[Any, Any]] = {}
    for one in cells:
        grouped.setdefault(one.settings, {})[one.part, one.length, one.seed] = one
    dense, sparse, some = (quality_report._row(grouped, name) for name in ("dense", "sparse", "some"))
    assert (dense["needle"], dense["num_needle_questions"]) == (pytest.approx(2.5 / 3), 3)
    assert (sparse["needle"], sparse["needle_of_dense"], sparse["num_needle_questions"]) == (0.5, 1.0, 2)
    assert sparse["needle_standard_error"] == pytest.approx((0.25 / 2) ** 0.5)
    assert (dense["ruler"], sparse["ruler"], sparse["ruler_standard_error"]) == (1.0, None, None)
    assert (some["ruler"], some["num_ruler_questions"]) == (None, 0)
    assert sparse["ppl_ratio"] == pytest.approx(1.10517, abs=1e-4)
    assert (sparse["greedy_match"], sparse["share_of_pairs"], sparse["tokens_per_query"]) == (2, 0.25, 1.0)
    assert quality_report._needles(grouped["dense"]) == {
        "1024": {"5": {"found": 1.0, "asked": 1}, "15": {"found": 1.0, "asked": 1}},
        "2048": {"5": {"found": 0.5, "asked": 1}},
    }
    assert quality_report._ruler(grouped["dense"]) == {
        f"{task} {length}": {"score": 1.0, "questions": 1} for task in RULER for length in (4096, 7424)
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings and lengths for a tiny model."""
    early = msgspec.structs.replace(LITTLE, budget_tokens=256, top_p=None)
    settings = {"dense": None, "early": early, "all": msgspec.structs.replace(early, budget_tokens=4096)}
    monkeypatch.setattr(quality, "SETTINGS", settings)


def needles(name: str, *lengths: int) -> quality.Job:
    return quality.Job(part="needle", settings=name, lengths=lengths, seed=0)


def test_a_bench_keeps_its_cells(tiny_directory: Path, tmp_path: Path, small: None) -> None:
    """Another goes on from them; what reads everything is dense's, which is measured if it was not."""
    path = tmp_path / "cells.jsonl"
    bench, other = (quality.Bench(tiny_directory, path) for _ in range(2))
    (whole,) = bench.run(needles("all", 1024))
    assert [own.settings for own in quality.read_cells(path).values()] == ["dense", "all"]
    (dense,) = other.measured(needles("dense", 1024).cells())
    assert (dense.scores, dense.commit) == (whole.scores, whole.commit)
    bench.run(needles("dense", 256, 1024))
    shared, whole_again = (
        [own.scores for own in chosen.run(needles("early", 256, 1024))] for chosen in (bench, other)
    )
    assert shared == whole_again, "bench had read the first tokens for dense, other nothing"
    cells = needles("early", 256, 1024).cells()
    assert [own.name for own in bench.measured(cells)] == [own.name for own in cells]
    assert bench.measured([msgspec.structs.replace(cells[0], sparse=LITTLE)]) == []


def test_a_torn_line_costs_only_itself(
    tiny_directory: Path, tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cells.jsonl"
    quality.Bench(tiny_directory, path).run(needles("dense", 512))
    path.write_bytes(path.read_bytes() + path.read_bytes()[:40])
    quality.Bench(tiny_directory, path).run(needles("early", 512))
    assert [own.settings for own in quality.read_cells(path).values()] == ["dense", "early"]
    assert "cells.jsonl:2: " in capsys.readouterr().err


def test_the_heat_map_has_a_panel_for_every_row_of_the_table(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")  # not on every GPU host
    found = {"1024": {str(DEPTHS[0]): {"found": 1.0, "asked": 1}}}
    shapes = []
    for count in (1, quality_report.PANELS_ABREAST, quality_report.PANELS_ABREAST + 1):
        quality_report.heat_map({str(n): found for n in range(count)}, tmp_path / "map.png")
        shapes.append(pyplot.imread(tmp_path / "map.png").shape[:2])
    (one_high, one_wide), (row_high, row_wide), (two_high, two_wide) = shapes
    assert one_high == row_high < two_high
    assert one_wide < row_wide == two_wide


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
    weights[0, 0, 7, 128] = 0.9  # one query's
    assert read(per_head=True, by_peak=True) == [[0, 2, 4], [0, 1, 5], [0, 2, 4], [0, 2, 5]]
    weights[0, 0, 7, 128] = 0.0
    weights[0, 1, :, 192] = 0.65  # a second block that this head looks at more than the other at its first
    assert read(per_head=True, across_heads=True) == [[0, 4], [0, 5], [0, 2, 3, 4], [0, 2, 3, 5]]
    weights[0, 1, :, 192] = 0.0
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
    assert long_context.integral(values, 8192, 512) == pytest.approx(exact, rel=0.07)
    assert long_context.integral(values, 2048, 512) == pytest.approx(14.0, rel=0.15)


def test_a_long_context_is_read_dense_and_sparse(tiny_directory: Path) -> None:
    """Whole prefills count what they read; the timed layers stand for all of the model's."""
    model = load_model(tiny_directory, "cpu", torch.float32)
    bench = long_context.Bench(long_context.cut(model, 2), 4, torch.arange(1024) % 200, 256)
    dense, sparse = bench.prefill([512, 1024], None), bench.prefill([512, 1024], LITTLE)
    assert [each.num_tokens for each in dense] == [each.num_tokens for each in sparse] == [512, 1024]
    assert dense[1].use.share_of_pairs == 1.0 > sparse[1].use.share_of_pairs
    assert dense[0].use.causal_pairs == sparse[0].use.causal_pairs
    steps = bench.step(1024, LITTLE, 1)
    by_kind = {kind: {1024: own} for kind, own in zip(("dense", "sparse"), steps, strict=True)}
    row = long_context.prefill_row(sparse[1], dense[1], by_kind, 256)
    assert row["dense_s"] == pytest.approx(4 * steps[0].total_s)
    assert row["speedup"] == pytest.approx(steps[0].total_s / steps[1].total_s)
    ends = dense[1].seconds.total_s, sparse[1].seconds.total_s
    assert (row["dense_end_to_end_s"], row["sparse_end_to_end_s"]) == ends
    assert long_context.prefill_row(sparse[1], None, by_kind, 256)["dense_end_to_end_s"] is None
    assert 0 < row["attention_share_sparse"] < 1
    assert 0 < row["sparse_tokens_per_query"] < 200
    (ratio,) = long_context.chunks_over_whole(dense[1:], {1024: steps[0]}, 256).values()
    assert ratio == pytest.approx(row["dense_s"] / dense[1].seconds.total_s)
    quest = msgspec.structs.replace(LITTLE, selector="quest")
    logits = [bench.decode_step(1024, chosen)() for chosen in (None, LITTLE, quest)]
    assert [own.shape for own in logits] == [(1, model.spec.vocab_size)] * 3
    assert not any(torch.equal(logits[0], own) for own in logits[1:])
    assert all(0 < seconds < 10 for seconds in bench.decode(1024, LITTLE, 1))
