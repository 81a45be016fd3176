"""What a model is: sizes and options read from a Hugging Face `config.json`. No tensors, no torch.

A new architecture that differs only in biases, qk-norm or defaults is one line in `MODELS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvrelay.errors import InvalidConfig, ModelError
from kvrelay.models.json_file import number, read_json_object, read_json_object_if_any
from kvrelay.models.rope_spec import RopeSpec, rope_spec, scaled_rope

Option = Literal["never", "always", "config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one architecture differs from Llama; `loader` is `module:function(directory, device, dtype, spec)`.

    `Option` fields say whether the feature is absent, always there, or follows the config's own key.
    """

    loader: str = "kvrelay.models.decoder:load_decoder"
    qkv_bias: Option = "never"
    output_bias: Option = "never"
    mlp_bias: Option = "never"
    qk_norm: bool = False
    head_dim: int | None = None  # the config class's default; None derives it from hidden_size
    window: Literal["never", "always", "use_sliding_window"] = "never"


MODELS: dict[str, Family] = {
    "LlamaForCausalLM": Family(qkv_bias="config", output_bias="config", mlp_bias="config"),
    "MistralForCausalLM": Family(window="always"),
    "Qwen2ForCausalLM": Family(qkv_bias="always", window="use_sliding_window"),
    "Qwen3ForCausalLM": Family(
        qkv_bias="config", output_bias="config", qk_norm=True, head_dim=128, window="use_sliding_window"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything the engine needs to know of a decoder before it loads a single weight.

    `max_position_embeddings` is the longest sequence in tokens. `sliding_window` is None unless the config
    names one; a window that would hide any position is refused. `dtype_name` is the dtype of the checkpoint
    (`"bfloat16"`, ...). `eos_token_ids` joins `config.json` and `generation_config.json`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    eos_token_ids: tuple[int, ...]
    dtype_name: str

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelSpec":
        """Read `config.json`, and `generation_config.json` if any; raises `ModelError` naming the file."""
        config = read_json_object(directory / "config.json")
        generation = read_json_object_if_any(directory / "generation_config.json")
        try:
            return cls.from_config(config, generation, directory / "config.json")
        except (TypeError, ValueError, ArithmeticError) as error:  # a value of another kind than the field's
            raise ModelError(f"{directory / 'config.json'}: {error}") from error

    def scaled(self, rope_scaling: str | None) -> "ModelSpec":
        """The model for sequences longer than it was trained for; None changes nothing.

        `rope_scaling` is `"yarn:FACTOR"` or `"linear:FACTOR"`; raises `InvalidConfig` as `scaled_rope` does.
        """
        if rope_scaling is None:
            return self
        rope = scaled_rope(self.rope, rope_scaling, self.max_position_embeddings)
        longest = int(self.max_position_embeddings * rope.factor)
        if self.sliding_window is not None and self.sliding_window < longest:
            raise InvalidConfig(
                f"rope_scaling={rope_scaling!r}: {longest} positions; the model's sliding window has "
                f"{self.sliding_window}"
            )
        return replace(self, rope=rope, max_position_embeddings=longest)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any], source: Path
    ) -> "ModelSpec":
        """Build the spec of a parsed config; `source` is named in every `ModelError`.

        Refused: architectures outside `MODELS`, quantised checkpoints, activations other than SiLU, rope
        types outside `ROPE_KINDS`, sliding windows shorter than the context, sizes that do not fit.
        """
        architecture = _architecture(config, source)
        family = MODELS[architecture]
        _refuse_unsupported(config, architecture, source)
        sizes = _sizes(config, family, source)
        return cls(
            architecture=architecture,
            rms_norm_eps=number(config, "rms_norm_eps", source, 1e-6),
            rope=rope_spec(config, source),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=_option(family.qkv_bias, config, "attention_bias"),
            output_bias=_option(family.output_bias, config, "attention_bias"),
            mlp_bias=_option(family.mlp_bias, config, "mlp_bias"),
            qk_norm=family.qk_norm,
            sliding_window=_sliding_window(config, architecture, source),
            eos_token_ids=_eos_token_ids(config, generation, source),
            dtype_name=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix(
                "torch."
            ),
            **sizes,
        )


def _architecture(config: Mapping[str, Any], source: Path) -> str:
    named = config.get("architectures") or []
    if not isinstance(named, list):
        raise ModelError(f"{source}: architectures must be a list of names, not {named!r}")
    if len(named) != 1 or str(named[0]) not in MODELS:
        found = ", ".join(map(str, named)) or f"none (model_type {config.get('model_type')!r})"
        raise ModelError(f"{source}: architecture {found} is not supported; supported: {sorted(MODELS)}")
    return str(named[0])


def _refuse_unsupported(config: Mapping[str, Any], architecture: str, source: Path) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(
            f"{source}: {architecture} with activation {activation!r} is not supported; only 'silu'"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        )
        raise ModelError(
            f"{source}: {architecture} quantised with {method!r} is not supported; use plain float weights"
        )


def _sizes(config: Mapping[str, Any], family: Family, source: Path) -> dict[str, int]:
    sizes = {
        field: _positive(config, key, source)
        for field, key in (
            ("vocab_size", "vocab_size"),
            ("hidden_size", "hidden_size"),
            ("intermediate_size", "intermediate_size"),
            ("num_layers", "num_hidden_layers"),
            ("num_q_heads", "num_attention_heads"),
            ("max_position_embeddings", "max_position_embeddings"),
        )
    }
    num_q_heads = sizes["num_q_heads"]
    sizes["num_kv_heads"] = _positive(config, "num_key_value_heads", source, num_q_heads)
    derived = family.head_dim or sizes["hidden_size"] // num_q_heads  # as transformers does
    sizes["head_dim"] = _positive(config, "head_dim", source, derived)
    if num_q_heads % sizes["num_kv_heads"]:
        raise ModelError(
            f"{source}: {num_q_heads} query heads are not a multiple of {sizes['num_kv_heads']} KV heads"
        )
    if sizes["head_dim"] % 2:
        raise ModelError(f"{source}: head_dim {sizes['head_dim']} must be even to rotate")
    return sizes


def _positive(config: Mapping[str, Any], key: str, source: Path, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or not 0 < value < 2**31:
        raise ModelError(f"{source}: {key} must be a positive integer below 2**31, not {value!r}")
    return value


def _option(option: Option, config: Mapping[str, Any], key: str) -> bool:
    return option == "always" or (option == "config" and bool(config.get(key, False)))


def _sliding_window(config: Mapping[str, Any], architecture: str, source: Path) -> int | None:
    """The window, if the config has one that hides nothing; 4096 is the config classes' own default."""
    kind = MODELS[architecture].window
    layer_types = config.get("layer_types") or []
    if kind == "never" or (kind == "use_sliding_window" and not config.get("use_sliding_window")):
        window = None
    else:
        window = config.get("sliding_window", 4096)
    limit = int(config["max_position_embeddings"])
    if set(layer_types) - {"full_attention"} and window is None:
        raise ModelError(
            f"{source}: {architecture} with layer types {sorted(set(layer_types))} is not supported"
        )
    if window is not None and window < limit:
        raise ModelError(
            f"{source}: {architecture} with sliding_window {window} below max_position_embeddings {limit} "
            "is not supported; only full attention is"
        )
    return window


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any], source: Path) -> tuple[int, ...]:
    """Those of `config.json` and of the `generation_config.json` beside it, in order, without repeats."""
    ids = [
        *_token_ids(config, source),
        *_token_ids(generation, source.with_name("generation_config.json")),
    ]
    return tuple(dict.fromkeys(ids))


def _token_ids(values: Mapping[str, Any], source: Path) -> list[int]:
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise ModelError(f"{source}: eos_token_id must be a token's number or a list of them, not {value!r}")
    return ids
