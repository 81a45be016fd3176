"""Sampling: the exact filtered distribution, seeds that do not see the batch, vLLM's penalties."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay import sampler
from kvrelay.sampler import Row, sample, score, uniform
from kvrelay.sampling_params import SamplingParams

VOCAB = 12
NUM_DRAWS = 3000
CHI_SQUARE_1E5 = {
    df: df + 4.27 * math.sqrt(2 * df) + 12.0 for df in range(1, VOCAB)
}  # above the 1e-5 quantile


def row(
    prompt: Sequence[int] = (0,),
    output: Sequence[int] = (),
    seed: int = 0,
    eos: Sequence[int] = (),
    **params: object,
) -> Row:
    return Row(
        SamplingParams(**params),  # type: ignore[arg-type]
        seed,
        [*prompt, *output],
        len(prompt),
        eos,
    )


def logits(seed: int = 0, num_rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 1.5


def draw(values: torch.Tensor, *rows: Row) -> list[int]:
    return [token for token, _ in sample(values.clone(), rows)]


def filtered(values: torch.Tensor, params: SamplingParams) -> list[float]:
    """The distribution sampling should follow, token by token in plain Python."""
    weights = [math.exp(v / params.temperature) for v in values.tolist()]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kept = order[: params.top_k] if params.top_k > 0 else order
    total, before, nucleus = sum(weights[t] for t in kept), 0.0, []
    for token in kept:
        if before < params.top_p:
            nucleus.append(token)
        before += weights[token] / total
    nucleus = [t for t in nucleus if weights[t] >= params.min_p * weights[order[0]]] or nucleus[:1]
    total = sum(weights[t] for t in nucleus)
    return [weights[t] / total if t in nucleus else 0.0 for t in range(len(weights))]


# Which token -----------------------------------------------------------------------------------------


def test_temperature_zero_is_the_largest_logit_whatever_the_filters() -> None:
    values = logits(3, 2)
    greedy = draw(values, row(temperature=0.0), row(temperature=0.0, top_k=3, top_p=0.1, min_p=0.9, seed=9))
    assert greedy == values.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
    ],
)
def test_draws_follow_the_filtered_distribution(params: dict[str, float]) -> None:
    values = logits(1)[0]
    expected = filtered(values, SamplingParams(**params))  # type: ignore[arg-type]
    rows = [row(seed=seed, **params) for seed in range(NUM_DRAWS)]
    counts = Counter(draw(values.expand(NUM_DRAWS, VOCAB), *rows))
    assert set(counts) <= {token for token, p in enumerate(expected) if p > 0}, "a filtered token was drawn"
    possible = [token for token, p in enumerate(expected) if p * NUM_DRAWS >= 5]
    statistic = sum((counts[t] - NUM_DRAWS * expected[t]) ** 2 / (NUM_DRAWS * expected[t]) for t in possible)
    assert statistic < CHI_SQUARE_1E5[max(1, len(possible) - 1)]


@pytest.mark.parametrize(
    ("params", "support"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 0}, {0, 1, 2, 3}),
        ({"top_k": -1}, {0, 1, 2, 3}),
        ({"top_k": 100}, {0, 1, 2, 3}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.501}, {0, 1}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.49}, {0, 1}),
        ({"min_p": 0.51}, {0}),
        ({"min_p": 0.0}, {0, 1, 2, 3}),
    ],
)
def test_filters_keep_what_they_should_at_their_edges(params: dict[str, float], support: set[int]) -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 2.0]).log()[None]  # probabilities 1/2, 1/4, 1/8, 1/8
    rows = [row(seed=seed, **params) for seed in range(300)]
    assert set(draw(values.expand(300, 4), *rows)) == support


def whole_sort(values: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens, likeliest first, and after filters the cumulative distribution: float64, up to 1."""
    ordered, tokens = (values - values.max()).double().sort(descending=True, stable=True)
    if params.top_k > 0:
        ordered, tokens = ordered[: params.top_k], tokens[: params.top_k]
    probabilities = (ordered / params.temperature).softmax(dim=-1)
    keep = probabilities.cumsum(dim=-1) - probabilities < params.top_p
    keep &= probabilities >= params.min_p * probabilities[0]
    keep[0] = True
    cumulative = probabilities.where(keep, 0.0).cumsum(dim=-1)
    return tokens, cumulative / cumulative[-1]


def drawn_from_a_whole_sort(values: torch.Tensor, r: Row) -> int:
    """The definition: all tokens sorted, filters, inverse distribution function."""
    tokens, cumulative = whole_sort(values, r.params)
    number = uniform(r.seed, len(r.token_ids))
    return int(tokens[int(torch.searchsorted(cumulative, number, right=True))])


@given(
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 8.0]),
    top_k=st.sampled_from([0, 1, 50, 2999, 3000]),
    top_p=st.sampled_from([1.0, 0.999, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 1e-12, 0.01, 1.0]),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=300, deadline=None)
def test_draws_are_those_of_a_whole_sort(
    scale: float, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    values = (logits(seed % 7, vocab=3000)[0] * scale * 8).round() / 8  # many ties
    values[5:50] = float("-inf")
    r = row(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert draw(values[None], r) == [drawn_from_a_whole_sort(values, r)]


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.7}, {"top_p": 0.9}, {"min_p": 0.001}, {"top_k": 4000}]
)
@pytest.mark.parametrize("vocab", [5000, 49_152])
def test_a_draw_at_the_edge_of_a_token_falls_on_its_side(
    params: dict[str, float], vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edges are found in float64: a sum in float32 alone would miss them by a thousand times as much."""
    values, r = logits(8, vocab=vocab)[0] * 2, row(**params)
    tokens, cumulative = whole_sort(values, r.params)
    for place in (0, 1, 7, 40, 300, 1000):
        if cumulative[place] == 1.0:
            break
        for side in (0, 1):
            number = float(cumulative[place]) + (2 * side - 1) * 1e-9
            monkeypatch.setattr(sampler, "uniform", lambda *_, number=number: number)
            assert draw(values[None], r) == [int(tokens[place + side])], f"place {place}, side {side}"


def test_top_p_is_a_share_of_what_top_k_leaves_however_much_the_rest_weighs() -> None:
    values = torch.full((40_050,), -10.1)
    values[:20] = 0.0  # of top-k's 20.00004 the share is 12.4, so 13 tokens; of all 21.6 it would be 13.4
    rows = [row(seed=seed, top_k=21, top_p=0.62) for seed in range(400)]
    assert set(draw(values.expand(400, -1), *rows)) == set(range(13))


def test_a_very_small_temperature_is_greedy() -> None:
    values = torch.tensor([[3.0, 5.0, 4.0]])
    for temperature in (1e-3, 1e-30, 1e-308, 5e-324):
        assert draw(values, row(temperature=temperature)) == [1], f"temperature={temperature}"


# Seeds -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 6), st.randoms(use_true_random=False))
def test_a_draw_does_not_depend_on_the_rest_of_the_batch(
    seed: int, num_others: int, shuffler: random.Random
) -> None:
    values = logits(5, num_others + 1)
    mine = row((1, 2), (3,), seed=seed, top_p=0.9, frequency_penalty=0.3, logprobs=3)
    alone = sample(values[:1].clone(), [mine])[0]
    others = [row(seed=i, temperature=i % 2, repetition_penalty=1.5) for i in range(num_others)]
    order = list(range(num_others + 1))
    shuffler.shuffle(order)
    together = sample(values[order].clone(), [[mine, *others][i] for i in order])
    assert together[order.index(0)] == alone


def test_a_retry_that_counts_delivered_tokens_in_draws_the_same() -> None:
    values = logits(2)
    assert [draw(values, row((1, 2), (3,) * n, seed=7)) for n in range(8)] == [
        draw(values, row((1, 2), (3,) * n, seed=7)) for n in range(8)
    ]
    tokens = {tuple(draw(values, row((1, 2), (3,) * n, seed=s))[0] for n in range(8)) for s in range(20)}
    assert len(tokens) == 20, "seeds must differ"


def test_uniform_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    for numbers in ([uniform(seed, 5) for seed in range(2000)], [uniform(5, p) for p in range(2000)]):
        assert all(0.0 <= number < 1.0 for number in numbers)
        buckets = Counter(int(number * 10) for number in numbers)
        assert sum((buckets[i] - 200) ** 2 / 200 for i in range(10)) < 40
    assert uniform(2**63 - 1, 0) != uniform(0, 0)


def test_seeds_do_not_share_their_numbers_at_other_positions() -> None:
    """Seeds 0, 1, 2 … are what people use: their streams must not be each other's, shuffled."""
    streams = [{uniform(seed, position) for position in range(64)} for seed in range(16)]
    assert len(set.union(*streams)) == 16 * 64


# Penalties -------------------------------------------------------------------------------------------


def penalised(values: torch.Tensor, r: Row) -> list[float]:
    """vLLM's semantics: repetition over prompt and output; presence and frequency over the output."""
    result = values.tolist()
    output = r.token_ids[r.num_prompt_tokens :]
    for token in set(r.token_ids):
        penalty = r.params.repetition_penalty
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token, count in Counter(output).items():
        result[token] -= r.params.presence_penalty + count * r.params.frequency_penalty
    return result


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    st.lists(st.integers(0, VOCAB - 1), max_size=6),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.sampled_from([-2.0, 0.0, 1.1]),
    st.sampled_from([-1.0, 0.0, 0.4]),
)
def test_penalties_equal_vllms(
    prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> None:
    values = logits(len(output))
    r = row(
        prompt,
        output,
        temperature=0.0,
        logprobs=VOCAB,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    expected = torch.tensor(penalised(values[0], r))
    ((token, logprobs),) = sample(values.clone(), [r])
    assert token == int(expected.argmax())
    assert logprobs is not None
    for other, value in enumerate(expected.log_softmax(-1).tolist()):
        assert logprobs.top[other] == pytest.approx(value, abs=1e-5)


def test_a_logit_bias_is_added_before_log_probabilities() -> None:
    values = logits(6)
    biased = values.clone()
    biased[0, 3] += 5.0
    biased[0, 9] -= 7.5
    ((_, logprobs),) = sample(values.clone(), [row(logit_bias={3: 5.0, 9: -7.5}, logprobs=8)])
    expected = biased.log_softmax(-1)[0]
    assert logprobs is not None
    assert logprobs.top == pytest.approx({int(i): float(expected[i]) for i in expected.topk(8).indices})


def test_a_given_tokens_score_is_its_log_softmax() -> None:
    values = torch.cat([logits(6), logits(7)])
    expected = values.log_softmax(-1)
    found = score(values, [3, 9], 2)
    assert [entry.token_id for entry in found] == [3, 9]
    assert [entry.logprob for entry in found] == pytest.approx([float(expected[0, 3]), float(expected[1, 9])])
    assert [list(entry.top) for entry in found] == expected.topk(2).indices.tolist()


def test_repetition_penalty_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    values, seen = logits(4), [1, 1, 5, 9]
    process = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    expected = process(torch.tensor([seen]), values.clone()).log_softmax(-1)[0]
    ((_, logprobs),) = sample(values.clone(), [row(seen, repetition_penalty=1.3, logprobs=VOCAB)])
    assert logprobs is not None
    assert [logprobs.top[t] for t in range(VOCAB)] == pytest.approx(expected.tolist(), abs=1e-6)


# Log-probabilities and minimum length -----------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_logprobs_are_log_softmax_before_temperature(count: int, temperature: float) -> None:
    values = logits(6)
    ((token, logprobs),) = sample(values.clone(), [row(temperature=temperature, top_k=2, logprobs=count)])
    expected = values.log_softmax(-1)[0]
    assert logprobs is not None
    assert logprobs.token_id == token
    assert logprobs.logprob == pytest.approx(float(expected[token]), abs=1e-6)
    best = expected.topk(count)
    assert list(logprobs.top) == best.indices.tolist(), "most likely first"
    assert list(logprobs.top.values()) == pytest.approx(best.values.tolist(), abs=1e-6)


def test_no_logprobs_unless_asked() -> None:
    assert sample(logits(), [row()])[0][1] is None


def test_more_logprobs_than_the_vocabulary_has_gives_all_of_them() -> None:
    ((_, logprobs),) = sample(logits(vocab=8), [row(logprobs=20)])
    assert logprobs is not None
    assert len(logprobs.top) == 8


@pytest.mark.parametrize(("num_output", "is_blocked"), [(0, True), (1, True), (2, False)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_blocks_eos_and_stop_ids_until_reached(
    num_output: int, is_blocked: bool, temperature: float
) -> None:
    values = torch.zeros(1, VOCAB)
    values[0, 4], values[0, 7] = 30.0, 29.0
    settings_ = {"min_tokens": 2, "stop_token_ids": [7], "temperature": temperature, "top_k": 2}
    drawn = {draw(values, row((0,), (1,) * num_output, seed=s, eos=(4,), **settings_))[0] for s in range(30)}
    assert (not drawn & {4, 7}) if is_blocked else drawn <= {4, 7}


# Broken logits ---------------------------------------------------------------------------------------


def test_minus_infinity_is_never_drawn() -> None:
    values = torch.full((1, VOCAB), float("-inf"))
    values[0, 3] = values[0, 5] = 0.0
    assert set(draw(values.expand(200, VOCAB), *[row(seed=s) for s in range(200)])) == {3, 5}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error_not_a_token(bad: float, temperature: float) -> None:
    """Contract 4: a number that is no number must not become a token that looks like an answer."""
    values = logits().repeat(2, 1)
    values[0, 4] = bad
    broken, sound = sample(values, [row(temperature=temperature), row(temperature=temperature)])
    assert broken is None
    assert sound is not None, "a neighbour's broken logits are not this row's"
