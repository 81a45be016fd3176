"""The rotary embedding a `config.json` asks for, in either of the two forms Hugging Face writes.

Knows names and numbers. The frequencies themselves are computed in `rope`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvrelay.errors import InvalidConfig, ModelError
from kvrelay.models.json_file import number

MAX_ROPE_FACTOR = 1024
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Parameters of one rotary embedding; fields a kind does not use keep their defaults.

    Names follow Hugging Face's `rope_parameters`. `attention_factor` multiplies cos and sin (yarn only);
    None means the value the YaRN paper derives from `factor`.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


def rope_spec(config: Mapping[str, Any], source: Path) -> RopeSpec:
    """Read `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (earlier) from a config.

    Precedence follows transformers' `RotaryEmbeddingConfigMixin`: `rope_scaling` before `rope_parameters`, a
    theta inside before one beside. Raises `ModelError` for a kind outside `ROPE_KINDS`, per-layer or partial
    rotary embeddings, and missing or non-positive parameters; the message names `source`.
    """
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ModelError(f"{source}: rotary parameters per layer type are not supported")
    if kind not in ROPE_KINDS:
        raise ModelError(f"{source}: rope type {kind!r} is not supported; supported: {list(ROPE_KINDS)}")
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(
            f"{source}: partial_rotary_factor {partial} is not supported; only whole heads rotate"
        )
    parameters.setdefault("rope_theta", config.get("rope_theta"))
    return _checked(_from_parameters(kind, parameters, config, source), source)


def scaled_rope(rope: RopeSpec, rope_scaling: str, num_positions: int) -> RopeSpec:
    """The embedding stretched beyond the `num_positions` it was trained for: `"yarn:4"` or `"linear:2"`.

    YaRN: arXiv:2309.00071. Raises `InvalidConfig` for anything else, and where the model has a scaling.
    """
    kind, _, text = rope_scaling.partition(":")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if kind not in ("yarn", "linear") or not 1.0 < factor <= MAX_ROPE_FACTOR:
        raise InvalidConfig(
            f"rope_scaling={rope_scaling!r}: expected yarn:FACTOR or linear:FACTOR, "
            f"FACTOR above 1 and at most {MAX_ROPE_FACTOR}"
        )
    if rope.kind != "default":
        raise InvalidConfig(
            f"rope_scaling={rope_scaling!r}: the model has a scaling of its own, {rope.kind!r} "
            f"by {rope.factor:g}"
        )
    return replace(rope, kind=kind, factor=factor, original_max_position_embeddings=num_positions)


def _from_parameters(
    kind: str, parameters: dict[str, Any], config: Mapping[str, Any], source: Path
) -> RopeSpec:
    def of(key: str, default: float) -> float:
        return number(parameters, key, source, default)

    limit = int(config["max_position_embeddings"])
    key = "original_max_position_embeddings"
    original = number(config, key, source, 0) or of(key, 0) or limit
    if parameters.get("factor") is None and kind in ("linear", "llama3"):
        raise ModelError(f"{source}: rope type {kind!r} needs 'factor'")
    if kind == "llama3" and not {"low_freq_factor", "high_freq_factor"} <= parameters.keys():
        raise ModelError(f"{source}: rope type 'llama3' needs 'low_freq_factor' and 'high_freq_factor'")
    has_attention_factor = kind == "yarn" and parameters.get("attention_factor") is not None
    return RopeSpec(
        kind=kind,
        theta=of("rope_theta", 10_000.0),
        factor=of("factor", limit / original) if kind != "default" else 1.0,
        original_max_position_embeddings=int(original),
        low_freq_factor=of("low_freq_factor", 1.0),
        high_freq_factor=of("high_freq_factor", 4.0),
        attention_factor=of("attention_factor", 1.0) if has_attention_factor else None,
        beta_fast=of("beta_fast", 32.0),
        beta_slow=of("beta_slow", 1.0),
        mscale=of("mscale", 0.0),
        mscale_all_dim=of("mscale_all_dim", 0.0),
        truncate=bool(parameters.get("truncate", True)),
    )


def _checked(rope: RopeSpec, source: Path) -> RopeSpec:
    for name in ("theta", "factor", "original_max_position_embeddings", "low_freq_factor", "beta_fast"):
        if not getattr(rope, name) > 0:
            raise ModelError(f"{source}: rotary {name} must be positive, not {getattr(rope, name)}")
    if rope.kind == "llama3" and not rope.high_freq_factor > rope.low_freq_factor:
        raise ModelError(
            f"{source}: high_freq_factor {rope.high_freq_factor} must exceed "
            f"low_freq_factor {rope.low_freq_factor}"
        )
    return rope
