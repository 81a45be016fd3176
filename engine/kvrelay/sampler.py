"""Logits to tokens: penalties, log-probabilities, filters, and one draw per row.

A draw depends on (seed, position, distribution) only: the uniform number comes from a counter-based hash
on the CPU, so it is the same whichever worker, batch or device computed the logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvrelay.sampling_params import SamplingParams
from kvrelay.types import TokenLogprobs
from kvrelay_kernels.cpu.sum_of_weights import RELATIVE_ERROR, sum_of_weights

_MASK = (1 << 64) - 1
TINY = 1e-300  # stands for a temperature of 0 where what comes of it is not used
REACHES = (7.0, 10.0, 13.0, 16.0, math.inf)
"""In temperatures below the largest logit: e^-7 of its weight, and so on, then all of it."""


@dataclass(frozen=True, slots=True)
class Row:
    """What sampling needs to know of one sequence: its tokens so far, and where the output begins."""

    params: SamplingParams
    seed: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    eos_token_ids: Sequence[int]

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens


Sampled = tuple[int, TokenLogprobs | None]


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[Sampled | None]:
    """The next token of each row of `logits [R, vocab]` (float32, overwritten), with log-probabilities.

    None for a row that holds NaN or +infinity, or nothing but -infinity: there is no token to choose there.
    """
    for logit, row in zip(logits, rows, strict=True):
        _penalise(logit, row)
    tokens = _choose_on_host(logits, rows) if logits.device.type == "cpu" else choose(logits, rows).tolist()
    return [
        None if token < 0 else (token, _logprobs(logit, row.params, token))
        for logit, row, token in zip(logits, rows, tokens, strict=True)
    ]


def is_plain(params: SamplingParams) -> bool:
    """Whether a token depends on nothing but its logits, seed and position: `choose` can take the row."""
    return (
        params.logprobs is None
        and not params.logit_bias
        and params.min_tokens == 0
        and params.repetition_penalty == 1.0
        and params.presence_penalty == params.frequency_penalty == 0.0
    )


def choose(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """The tokens of `sample` for rows that `is_plain`, computed where `logits [R, vocab]` are.

    int64 [R] on their device, which the host does not wait for; -1 where there is no token to choose. Of the
    rows' tokens only the number is read. The whole row is sorted where the host sorts the likeliest tokens.
    """
    largest, tokens = logits.max(dim=-1)
    if any(row.params.temperature > 0 for row in rows):
        is_drawn, drawn = _draw_all(logits - largest[:, None], rows)
        tokens = torch.where(is_drawn, drawn, tokens)
    return torch.where(largest.isfinite(), tokens, -1)


def _draw_all(below: torch.Tensor, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each row is drawn, and the token, by the rules of `_draw`; the largest of `below` is 0."""
    settings = [(*_filters(row.params), uniform(row.seed, len(row.token_ids))) for row in rows]
    table = torch.tensor(settings, dtype=torch.float64)
    if below.is_cuda:
        table = table.pin_memory().to(below.device, non_blocking=True)
    temperature, top_k, top_p, min_p, target = table[:, :, None].unbind(1)
    values, order = below.double().div(temperature.clamp(min=TINY)).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(values.shape[1], device=values.device)
    weights = values.exp() * (ranks < top_k)
    keep = weights.cumsum(dim=-1) - weights < top_p * weights.sum(dim=-1, keepdim=True)
    keep &= (weights >= min_p * weights[:, :1]) & (weights > 0)  # the first is always kept
    cumulative = (weights * keep).cumsum(dim=-1)
    index = (cumulative <= target * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    index = torch.minimum(index, keep.sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # of NaN, none is kept
    return temperature[:, 0] > 0, order.gather(1, index)[:, 0]


def _filters(params: SamplingParams) -> tuple[float, float, float, float]:
    top_k = float(params.top_k) if params.top_k > 0 else math.inf
    return params.temperature, top_k, params.top_p, params.min_p


def score(logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probability of one given token per row of `logits [R, vocab]`, with the `num_top` most likely."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    values, tokens = (found.tolist() for found in logprobs.topk(min(num_top, logprobs.shape[1])))
    tops = (dict(zip(*row, strict=True)) for row in zip(tokens, values, strict=True))
    return [TokenLogprobs(*row) for row in zip(token_ids, own, tops, strict=True)]


def _choose_on_host(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """What `choose` gives, row by row, sorting only what a draw needs."""
    values = logits.numpy()
    chosen: list[int] = values.argmax(axis=-1).tolist()  # NaN is the largest of all
    for index, (token, row) in enumerate(zip(chosen, rows, strict=True)):
        largest = values[index, token]
        if not math.isfinite(largest):
            chosen[index] = -1
        elif row.params.temperature > 0:
            chosen[index] = _draw(values[index] - largest, row)
    return chosen


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position), by rounds of SplitMix64 (Steele et al., OOPSLA 2014)."""
    state = seed & _MASK
    for word in (0x5851F42D4C957F2D, position):
        state = (state ^ word) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def _penalise(logit: torch.Tensor, row: Row) -> None:
    params = row.params
    if row.num_output_tokens < params.min_tokens:
        blocked = [*params.stop_token_ids, *row.eos_token_ids]
        logit[blocked] = float("-inf")
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias), device=logit.device)
        logit[tokens] += torch.tensor(list(params.logit_bias.values()), device=logit.device)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.token_ids)), device=logit.device)
        values = logit[seen]
        penalty = params.repetition_penalty
        logit[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output = row.token_ids[row.num_prompt_tokens :]
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = torch.bincount(torch.tensor(output, device=logit.device), minlength=logit.numel())
        logit -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts


@np.errstate(over="ignore")  # by a temperature near 0
def _draw(below: NDArray[np.float32], row: Row) -> int:
    """Temperature, top-k, then top-p and min-p on what is left, then the inverse distribution function.

    below: [V], 0 the largest. The order is that of a whole sort and the arithmetic float64, but only tokens
    within reach of the likeliest are sorted, and of the others nothing is needed but the sum of all weights:
    bounds from float32 do where both give the same token, and nearly always they do.
    """
    params = row.params
    totals = _total_about(below, params)
    for reach in REACHES:
        tokens, weights, is_all = _likeliest(below, params, reach)
        cumulative = weights.cumsum()
        if is_all:
            totals = (float(cumulative[-1]),)
        indices = {_index(weights, cumulative, total, row, is_all) for total in totals}
        if len(indices) > 1:
            totals = (float(np.exp(below.astype(np.float64) / params.temperature).sum()),)
            indices = {_index(weights, cumulative, totals[0], row, is_all)}
        if (index := indices.pop()) is not None:
            return int(tokens[index])
    raise AssertionError("a reach of everything has every token")


def _total_about(below: NDArray[np.float32], params: SamplingParams) -> tuple[float, ...]:
    """Bounds of the sum of all weights. With top-k none are needed, and none known of odd temperatures."""
    if params.top_k > 0 or not 1e-30 < params.temperature < 1e30:
        return (0.0, math.inf)
    total = sum_of_weights(below, params.temperature)
    return (total * (1 - RELATIVE_ERROR), total * (1 + RELATIVE_ERROR))


def _likeliest(
    below: NDArray[np.float32], params: SamplingParams, reach: float
) -> tuple[NDArray[np.int64], NDArray[np.float64], bool]:
    """Tokens at least `-reach` temperatures below the largest, likeliest first, at most top-k of them.

    With their weights, float64; and whether these are all that top-k leaves, weights of 0 apart.
    """
    tokens = np.flatnonzero(below >= -reach * params.temperature)
    bits = np.abs(below[tokens]).view(np.uint32).astype(np.int64)  # in the order of the floats
    keys = bits << 32 | tokens
    keys.sort()  # many times as fast as a stable sort of floats, and equals stay in order
    tokens = keys & 0xFFFFFFFF
    is_all = len(tokens) == len(below)
    if 0 < params.top_k <= len(tokens):
        tokens, is_all = tokens[: params.top_k], True
    weights = np.exp(below[tokens].astype(np.float64) / params.temperature)
    num_possible = int(np.count_nonzero(weights))
    return tokens[:num_possible], weights[:num_possible], is_all


def _index(
    weights: NDArray[np.float64], cumulative: NDArray[np.float64], total: float, row: Row, is_all: bool
) -> int | None:
    """The place in the order of the token drawn; None if it, or the end of a filter, lies beyond `weights`.

    `total` is the sum of all weights, `is_all` whether there are no others.
    """
    params = row.params
    if params.top_k > 0 and not is_all:
        return None
    num_kept = len(weights)  # the filters keep a beginning of the order
    if params.top_p < 1:
        num_kept = int(np.count_nonzero(cumulative - weights < params.top_p * total))
    if params.min_p > 0:
        num_kept = min(num_kept, int(np.count_nonzero(weights >= params.min_p * weights[0])))
    num_kept = max(num_kept, 1)
    is_whole = is_all or num_kept < len(weights)
    if is_whole:
        total = float(cumulative[num_kept - 1])
    elif params.top_p < 1 or params.min_p > 0:
        return None
    index = int(
        np.searchsorted(cumulative[:num_kept], uniform(row.seed, len(row.token_ids)) * total, "right")
    )
    if index < num_kept:
        return index
    return num_kept - 1 if is_whole else None


def _logprobs(logit: torch.Tensor, params: SamplingParams, token: int) -> TokenLogprobs | None:
    if params.logprobs is None:
        return None
    logprobs = logit.log_softmax(dim=-1)
    values, tokens = logprobs.topk(min(params.logprobs, logprobs.numel()))
    top = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, float(logprobs[token]), top)
