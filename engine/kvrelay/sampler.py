"""Logits to tokens: penalties, log-probabilities, filters, and one draw per row.

A draw depends on (seed, position, distribution) only: the uniform number comes from a counter-based hash
on the CPU, so it is the same whichever worker, batch or device computed the logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvrelay.types import SamplingParams, TokenLogprobs

_MASK = (1 << 64) - 1


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


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[tuple[int, TokenLogprobs | None]]:
    """The next token of each row of `logits [R, vocab]` (float32, may be overwritten), with log-probabilities."""
    for logit, row in zip(logits, rows, strict=True):
        _penalise(logit, row)
    greedy = logits.argmax(dim=-1).tolist()
    result = []
    for logit, row, best in zip(logits, rows, greedy, strict=True):
        token = best if row.params.temperature == 0 else _draw(logit, row)
        result.append((token, _logprobs(logit, row.params, token)))
    return result


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): two rounds of SplitMix64. Source: Steele et al., OOPSLA 2014."""
    state = seed & _MASK
    for word in (position, 0x5851F42D4C957F2D):
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
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.token_ids)), device=logit.device)
        values = logit[seen]
        penalty = params.repetition_penalty
        logit[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output = row.token_ids[row.num_prompt_tokens :]
    if output and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = torch.tensor(output, device=logit.device).unique(return_counts=True)
        logit[tokens] -= params.presence_penalty + params.frequency_penalty * counts.to(logit.dtype)


def _draw(logit: torch.Tensor, row: Row) -> int:
    """Temperature, then top-k, top-p and min-p on what is left, then the inverse of the distribution function."""
    params = row.params
    values, tokens = (logit.double() / params.temperature).sort(descending=True, stable=True)
    if params.top_k > 0:
        values, tokens = values[: params.top_k], tokens[: params.top_k]
    probabilities = values.softmax(dim=-1)
    keep = probabilities.cumsum(dim=-1) - probabilities < params.top_p
    keep &= probabilities >= params.min_p * probabilities[0]
    keep[0] = True
    cumulative = probabilities.where(keep, 0.0).cumsum(dim=-1)
    target = uniform(row.seed, len(row.token_ids)) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, target, right=True))
    return int(tokens[min(index, int(keep.nonzero()[-1]))])


def _logprobs(logit: torch.Tensor, params: SamplingParams, token: int) -> TokenLogprobs | None:
    if params.logprobs is None:
        return None
    logprobs = logit.log_softmax(dim=-1)
    values, tokens = logprobs.topk(params.logprobs)
    top = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, float(logprobs[token]), top)
