import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvrelay.errors import ModelError
from kvrelay.models.spec import MODELS, ModelSpec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def write(directory: Path, **changes: Any) -> Path:
    config = {key: value for key, value in (CONFIG | changes).items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_defaults_and_ids(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    spec = ModelSpec.from_directory(write(tmp_path))
    assert (spec.head_dim, spec.rope.theta, spec.rope.kind) == (16, 10_000.0, "default")
    assert spec.eos_token_ids == (2, 7)
    assert spec.dtype_name == "bfloat16"
    assert not any((spec.tie_word_embeddings, spec.qkv_bias, spec.qk_norm))


SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
    ],
)
def test_old_and_new_rope_forms_are_one(old: dict[str, Any], tmp_path: Path) -> None:
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING}}
    old_spec = ModelSpec.from_directory(write(tmp_path, **old))
    new_spec = ModelSpec.from_directory(write(tmp_path, **new))
    assert old_spec == new_spec
    assert (new_spec.rope.kind, new_spec.rope.factor) == ("llama3", 8.0)
    assert new_spec.rope.original_max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM", *MODELS]),
        ({"architectures": None, "model_type": "gpt2"}, ["gpt2", "supported"]),
        ({"architectures": {"a": 1}}, ["architectures", "list"]),
        ({"architectures": [{"a": 1}]}, ["'a': 1", "supported"]),
        ({"hidden_act": "gelu"}, ["LlamaForCausalLM", "gelu"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["LlamaForCausalLM", "awq"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["longrope", "llama3", "yarn"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", "linear"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, ["factor", "positive"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["per layer"]),
        ({"hidden_size": "absent"}, ["hidden_size", "positive"]),
        ({"num_key_value_heads": -2}, ["num_key_value_heads", "positive", "-2"]),
        ({"head_dim": "64"}, ["head_dim", "positive", "'64'"]),
        ({"max_position_embeddings": 2**31}, ["max_position_embeddings", "below 2**31"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps", "'small'"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps", "more than 300 digits"]),
        ({"rms_norm_eps": float("inf")}, ["rms_norm_eps", "finite"]),
        ({"rope_theta": [1]}, ["rope_theta", "[1]"]),
        ({"rope_theta": 10**400}, ["rope_theta", "more than 300 digits"]),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": "x"}}, ["original_max"]),
        ({"rope_scaling": {"rope_type": "yarn", "attention_factor": "x"}}, ["attention_factor", "'x'"]),
        ({"eos_token_id": 1.5}, ["eos_token_id", "1.5"]),
        ({"num_key_value_heads": 3}, ["4 query heads", "3 KV heads"]),
        ({"head_dim": 15}, ["head_dim 15", "even"]),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 1024},
            ["Mistral", "sliding_window 1024"],
        ),
        ({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}, ["sliding_window 4096"]),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 64},
            ["Qwen2ForCausalLM", "sliding_window 64"],
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention", "linear_attention"]},
            ["Qwen3ForCausalLM", "linear_attention"],
        ),
    ],
)
def test_refused_by_name(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        ModelSpec.from_directory(write(tmp_path, **changes))
    for word in [*words, "config.json"]:
        assert word in str(caught.value)


def test_windows_that_hide_nothing_are_accepted(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert ModelSpec.from_directory(write(tmp_path, **mistral, sliding_window=None)).sliding_window is None
    assert ModelSpec.from_directory(write(tmp_path, **mistral, sliding_window=4096)).sliding_window == 4096
    qwen = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 64}
    assert ModelSpec.from_directory(write(tmp_path, **qwen)).sliding_window is None


@pytest.mark.parametrize("ids", [1.5, [1, "2"], {"a": 1}])
def test_ids_that_are_none_name_the_file_they_come_from(tmp_path: Path, ids: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ModelError, match=r"/generation_config\.json: eos_token_id must be .*, not "):
        ModelSpec.from_directory(write(tmp_path))


@pytest.mark.parametrize("text", [None, "{", "[]", b"\xff\xfe{", '{"a": ' + "1" * 5000 + "}", "[" * 200_000])
def test_missing_or_corrupt_config_names_the_file(text: str | bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelSpec.from_directory(tmp_path)


def test_torch_free_modules_import_no_torch() -> None:
    modules = "spec, hub, gguf, tokenizer, parameters, progress"
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from kvrelay.models import {modules}; "
        "print([name for name in ('torch', 'gguf', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
