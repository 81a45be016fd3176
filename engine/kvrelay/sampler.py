"""Logits to tokens: penalties, log-probabilities, filters, and one draw per row.

A draw depends on (seed, position, distribution) only: the uniform number comes from a counter-based hash
on the CPU, so it is the same whichever worker, batch or device computed the logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvrelay.sampling_params import SamplingParams
from kvrelay.types import TokenLogprobs

_MASK = (1 << 64) - 1
TINY = 1e-300  # stands for a temperature of 0 where what comes of it is not used
REACHES = (10.0, 40.0, math.inf)  # in temperatures below the largest logit: e^-10 of its weight, all of it


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
    result: list[Sampled | None] = []
    for logit, row, (best, largest) in zip(logits, rows, _largest(logits), strict=True):
        if not math.isfinite(largest):
            result.append(None)
            continue
        token = best if row.params.temperature == 0 else _draw(logit, row)
        result.append((token, _logprobs(logit, row.params, token)))
    return result


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
    rows' tokens only the number is read. The whole row is sorted where `sample` sorts the likeliest tokens.
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


def _largest(logits: torch.Tensor) -> list[tuple[int, float]]:
    """Token and logit of each row's largest, NaN being larger than anything; numpy's is the fast one."""
    if logits.device.type == "cpu":
        values = logits.numpy()
        tokens = values.argmax(axis=-1)
        return list(zip(tokens.tolist(), values[range(len(tokens)), tokens].tolist(), strict=True))
    largest, greedy = logits.max(dim=-1)
    return list(zip(greedy.tolist(), largest.tolist(), strict=True))


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


def _draw(logit: torch.Tensor, row: Row) -> int:
    """Temperature, top-k, then top-p and min-p on what is left, then the inverse distribution function.

    The distribution's order is that of a whole sort, but only tokens within reach of the likeliest are
    sorted: few are, and nearly always the draw ends among them.
    """
    below = (logit - logit.max()).double() / row.params.temperature
    total = float(below.exp().sum())
    tokens = (_draw_within(below, total, row, reach) for reach in REACHES)
    return next(token for token in tokens if token is not None)


def _draw_within(below: torch.Tensor, total: float, row: Row, reach: float) -> int | None:
    """The token drawn if it and the ends of all filters lie among those at least `-reach`, else None.

    below: float64 [V], log-weights, 0 the largest; `total` is the sum of all weights.
    """
    params, is_all = row.params, reach == REACHES[-1]
    tokens = (below >= -reach).nonzero().flatten()
    values, order = below[tokens].sort(descending=True, stable=True)
    if params.top_k > 0 and (is_all or len(tokens) >= params.top_k):
        values, is_all = values[: params.top_k], True
        total = float(values.exp().sum())
    weights = values.exp()
    keep = weights.cumsum(dim=-1) - weights < params.top_p * total
    keep &= (weights >= params.min_p * weights[0]) & (weights > 0)
    keep[0] = True
    num_kept = int(keep.sum())  # the filters keep a beginning of the order
    if num_kept == len(keep) and not is_all and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0):
        return None
    is_whole = is_all or num_kept < len(keep)
    cumulative = weights[:num_kept].cumsum(dim=-1)
    target = uniform(row.seed, len(row.token_ids)) * (float(cumulative[-1]) if is_whole else total)
    index = int(torch.searchsorted(cumulative, target, right=True))
    if index >= num_kept and not is_whole:
        return None
    return int(tokens[order[min(index, num_kept - 1)]])


def _logprobs(logit: torch.Tensor, params: SamplingParams, token: int) -> TokenLogprobs | None:
    if params.logprobs is None:
        return None
    logprobs = logit.log_softmax(dim=-1)
    values, tokens = logprobs.topk(min(params.logprobs, logprobs.numel()))
    top = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, float(logprobs[token]), top)
