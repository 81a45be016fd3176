"""Rotary position embedding: inverse frequencies for each kind of scaling, and the rotation itself.

Own code, because importing transformers costs seconds at every worker's start; tests hold it equal to
transformers' `ROPE_INIT_FUNCTIONS`.
"""

import math
from collections.abc import Callable

import torch

from kvrelay.models.rope_spec import RopeSpec


class Rope:
    """Frequencies of one model on one device; stateless otherwise."""

    def __init__(self, rope: RopeSpec, head_dim: int, device: torch.device) -> None:
        inverse, self._attention_factor = inverse_frequencies(rope, head_dim)
        self._inverse = inverse.to(device)

    def tables(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin), each [T, 1, head_dim / 2] in `dtype`, for int64 `positions` [T].

        Angles, cos and sin are float32 whatever `dtype` is: bfloat16 cannot count past 256.
        """
        angles = positions[:, None].float() * self._inverse
        cos, sin = angles.cos() * self._attention_factor, angles.sin() * self._attention_factor
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x [T, heads, head_dim]; returns a new tensor.

    RoFormer (arXiv:2104.09864), with the halves paired as in GPT-NeoX and Hugging Face.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """Return (float32 [head_dim / 2] on the CPU, the factor on cos and sin) for `rope.kind`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return _KINDS[rope.kind](rope, rope.theta**exponents, head_dim)


def _default(rope: RopeSpec, wavelengths: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    return 1.0 / wavelengths, 1.0


def _linear(rope: RopeSpec, wavelengths: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    """Position interpolation (arXiv:2306.15595): every position is divided by `factor`."""
    return 1.0 / wavelengths / rope.factor, 1.0


def _llama3(rope: RopeSpec, wavelengths: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between blended.

    Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (`apply_scaling`).
    """
    inverse = 1.0 / wavelengths
    context = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    smooth = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
    is_long = wavelength > context / rope.low_freq_factor
    is_short = wavelength < context / rope.high_freq_factor
    return torch.where(is_long, inverse / rope.factor, torch.where(is_short, inverse, blended)), 1.0


def _yarn(rope: RopeSpec, wavelengths: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv:2309.00071): a ramp over the dimensions from extrapolation to interpolation."""
    low, high = (
        _dimension_of_rotations(rope, rotations, head_dim) for rotations in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    keep = 1 - ramp
    inverse = 1.0 / (rope.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep
    return inverse, _yarn_attention_factor(rope)


def _dimension_of_rotations(rope: RopeSpec, rotations: float, head_dim: int) -> float:
    """Dimension whose wave turns `rotations` times over the original context (YaRN, section 3.2)."""
    turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(rope.theta))


def _yarn_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    if rope.mscale and rope.mscale_all_dim:
        return _temperature(rope.factor, rope.mscale) / _temperature(rope.factor, rope.mscale_all_dim)
    return _temperature(rope.factor, 1.0)


def _temperature(factor: float, mscale: float) -> float:
    """YaRN, equation 22: 0.1 ln(s) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_KINDS: dict[str, Callable[[RopeSpec, torch.Tensor, int], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
