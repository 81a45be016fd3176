"""Rebuilds a Hugging Face `config.json` from GGUF metadata. No torch.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvrelay.errors import ModelError

GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_LLAMA3_CONTEXT = 8192  # every published Llama 3.1 to 3.3 checkpoint: (low 1, high 4, original context 8192)


def config_from_metadata(
    metadata: Mapping[str, Any], tensors: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Return the config of a GGUF file; `tensors` tells biases and tied embeddings.

    Raises `ModelError` naming `path` for another architecture, mixtures of experts and missing keys.
    """
    gguf_architecture = metadata.get("general.architecture")
    if gguf_architecture not in GGUF_ARCHITECTURES:
        raise ModelError(
            f"{path}: GGUF architecture {gguf_architecture!r} is not supported; "
            f"supported: {sorted(GGUF_ARCHITECTURES)}"
        )
    keys = _Keys(metadata, gguf_architecture, path)
    if keys.get("expert_count", 0):
        raise ModelError(
            f"{path}: mixtures of experts are not supported (expert_count {keys['expert_count']})"
        )
    window = keys.get("attention.sliding_window", None)
    is_mistral = gguf_architecture == "llama" and window is not None
    architecture = "MistralForCausalLM" if is_mistral else GGUF_ARCHITECTURES[gguf_architecture]
    config = {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": architecture == "LlamaForCausalLM" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": architecture == "LlamaForCausalLM" and "blk.0.ffn_down.bias" in tensors,
        "torch_dtype": "bfloat16",
    }
    if is_mistral:
        config["sliding_window"] = window
    return config | _sizes(keys) | _rope(keys, tensors) | _token_ids(metadata)


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return `generation_config.json`: the ids that begin, end and pad, with every end the file names."""
    ids = _token_ids(metadata)
    ends = [ids["eos_token_id"], metadata.get("tokenizer.ggml.eot_token_id")]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    return ids | {"eos_token_id": unique[0] if len(unique) == 1 else unique}


class _Keys:
    """Metadata under one architecture's prefix; a key that must be there but is not raises `ModelError`."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, path: Path) -> None:
        self.metadata, self.architecture, self.path = metadata, architecture, path

    def __getitem__(self, name: str) -> Any:
        key = f"{self.architecture}.{name}"
        if key not in self.metadata:
            raise ModelError(f"{self.path}: GGUF key {key!r} is missing")
        return self.metadata[key]

    def get(self, name: str, default: Any) -> Any:
        return self.metadata.get(f"{self.architecture}.{name}", default)


def _sizes(keys: _Keys) -> dict[str, Any]:
    num_heads = keys["attention.head_count"]
    if not isinstance(num_heads, int) or not isinstance(keys.get("attention.head_count_kv", num_heads), int):
        raise ModelError(f"{keys.path}: a head count per layer is not supported")
    head_dim = keys.get("attention.key_length", keys["embedding_length"] // num_heads)
    rotated = keys.get("rope.dimension_count", head_dim)
    if rotated != head_dim or keys.get("attention.value_length", head_dim) != head_dim:
        raise ModelError(
            f"{keys.path}: rope over {rotated} of {head_dim} dimensions, or values of another size than "
            "keys, is not supported"
        )
    return {
        "hidden_size": keys["embedding_length"],
        "intermediate_size": keys["feed_forward_length"],
        "num_hidden_layers": keys["block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys["context_length"],
        # stored as float32; the shortest decimal that rounds to it is what the author wrote
        "rms_norm_eps": _shortest(keys["attention.layer_norm_rms_epsilon"]),
    }


def _shortest(value: float) -> float:
    import numpy as np

    return float(str(np.float32(value)))


def _rope(keys: _Keys, tensors: Mapping[str, Any]) -> dict[str, Any]:
    theta = float(keys.get("rope.freq_base", 10_000.0))
    kind = keys.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        return {
            "rope_theta": theta,
            "rope_scaling": _llama3_scaling(keys, tensors["rope_freqs.weight"].data, theta),
        }
    legacy_factor = keys.get("rope.scale_linear", 1.0)
    if kind == "none" and legacy_factor != 1.0:
        return {"rope_theta": theta, "rope_scaling": {"rope_type": "linear", "factor": float(legacy_factor)}}
    if kind == "none":
        return {"rope_theta": theta, "rope_scaling": None}
    if keys.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ModelError(f"{keys.path}: rope.scaling.attn_factor is not supported")
    scaling = {"rope_type": kind, "factor": float(keys["rope.scaling.factor"])}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]
        for name in ("beta_fast", "beta_slow"):
            if (value := keys.get(f"rope.scaling.yarn_{name}", None)) is not None:
                scaling[name] = float(value)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _llama3_scaling(keys: _Keys, divisors: Any, theta: float) -> dict[str, Any]:
    """Recover llama3 scaling, which GGUF stores as one divisor per frequency, and check that it fits."""
    import numpy as np

    factor = float(np.max(divisors))
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
    num = len(divisors)
    expected = [_llama3_divisor(theta ** (-index / num), factor) for index in range(num)]
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise ModelError(f"{keys.path}: rope_freqs.weight is not a known llama3 scaling")
    return scaling


def _llama3_divisor(frequency: float, factor: float) -> float:
    """Divisor of one inverse frequency under llama3 scaling with low 1 and high 4 (see `rope`)."""
    turns = _LLAMA3_CONTEXT * frequency / (2 * math.pi)
    if turns < 1.0:
        return factor
    if turns > 4.0:
        return 1.0
    smooth = (turns - 1.0) / 3.0
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "padding_token_id",
    }
    return {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in names.items()}
