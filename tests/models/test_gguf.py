import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import NUM_TOKENS, gguf_tensors, tiny_gguf, write_gguf
from tiny_models import DenseSequences, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvrelay.errors import ModelError
from kvrelay.models.decoder import load_decoder
from kvrelay.models.gguf import convert_gguf, halves_from_pairs, read_gguf
from kvrelay.models.rope import inverse_frequencies
from kvrelay.models.rope_spec import RopeSpec
from kvrelay.models.safetensors_writer import to_bfloat16_bits
from kvrelay.models.spec import ModelSpec


def convert(path: Path) -> Path:
    directory = path.parent / "converted"
    directory.mkdir()
    convert_gguf(path, directory)
    return directory


@pytest.mark.parametrize(
    ("model_name", "architecture"),
    [
        ("llama", "llama"),
        ("llama-biases", "llama"),
        ("qwen2", "qwen2"),
        ("qwen2-untied", "qwen2"),
        ("qwen3-biases", "qwen3"),
    ],
)
def test_converted_model_runs_like_the_original(model_name: str, architecture: str, tmp_path: Path) -> None:
    overrides = {"attention_bias": False} if architecture == "qwen3" else {}
    model = tiny_model(model_name, vocab_size=NUM_TOKENS, **overrides)
    for (
        parameter
    ) in model.parameters():  # bfloat16 then holds them: only the conversion can change the logits
        parameter.data = parameter.data.to(torch.bfloat16).float()
    token_ids = list(range(40, 80))
    directory = convert(tiny_gguf(tmp_path / "m.gguf", model, architecture))
    decoder = load_decoder(directory, "cpu", torch.float32)
    [logits] = DenseSequences(decoder, 1).forward([(0, token_ids)])
    with torch.no_grad():
        expected = model(torch.tensor([token_ids])).logits[0]
        again = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(
            torch.tensor([token_ids])
        )
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(again.logits[0], expected, rtol=1e-5, atol=2e-4)


def test_quantised_tensors_are_dequantised_then_reordered(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=NUM_TOKENS)
    path = tiny_gguf(tmp_path / "m.gguf", model, quantized="attn_q.weight")
    decoder = load_decoder(convert(path), "cpu", torch.bfloat16)
    down, query = (getattr(model.model.layers[0], name) for name in ("mlp", "self_attn"))
    assert torch.equal(decoder.layers[0].down, down.down_proj.weight.to(torch.bfloat16))
    kind = gguf.GGMLQuantizationType.Q8_0
    rows = gguf.quants.quantize(query.q_proj.weight.numpy(force=True), kind)
    expected = torch.from_numpy(gguf.quants.dequantize(rows, kind)).to(torch.bfloat16)
    assert torch.equal(decoder.layers[0].qkv[:64], expected)


def test_bfloat16_rounding_equals_torch() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10
    values[:4] = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875])  # the last two are ties
    expected = values.to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16_bits(values.numpy()), expected)


def test_row_order_is_undone_per_head() -> None:
    pairs = np.array([[0, 2, 1, 3, 4, 6, 5, 7]]).T  # two heads of four: neighbours rotate together
    assert halves_from_pairs(pairs, 2)[:, 0].tolist() == list(range(8))


def test_directory_is_complete(tmp_path: Path) -> None:
    directory = convert(tiny_gguf(tmp_path / "m.gguf", tiny_model("llama", vocab_size=NUM_TOKENS)))
    assert {path.name for path in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    spec = ModelSpec.from_directory(directory)
    assert (spec.dtype_name, spec.rms_norm_eps, spec.eos_token_ids) == ("bfloat16", 1e-5, (0,))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|start|>user: the<|end|>"
    assert tokenizer.eos_token == "<|end|>"


@pytest.mark.parametrize(
    ("changes", "kind", "factor"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "linear", 4.0),
        ({"llama.rope.scale_linear": 2.0}, "linear", 2.0),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            "yarn",
            4.0,
        ),
    ],
)
def test_rope_scaling_keys(changes: dict[str, Any], kind: str, factor: float, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=NUM_TOKENS)
    rope = ModelSpec.from_directory(convert(tiny_gguf(tmp_path / "m.gguf", model, **changes))).rope
    assert (rope.kind, rope.factor, rope.theta) == (kind, factor, 1000.0)
    assert kind != "yarn" or rope.original_max_position_embeddings == 64


def write_with_divisors(path: Path, divisors: np.ndarray[Any, Any]) -> Path:
    """llama.cpp stores llama3 scaling as one divisor per frequency."""
    parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    model = tiny_model("llama", vocab_size=NUM_TOKENS, rope_parameters=parameters)
    metadata, _ = read_gguf(tiny_gguf(path, model))
    kept = {key: value for key, value in metadata.items() if not key.startswith("GGUF.")}
    tensors = gguf_tensors(model, "llama") | {"rope_freqs.weight": divisors.astype(np.float32)}
    return write_gguf(path, kept, tensors)


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    rope = RopeSpec(kind="llama3", theta=500_000.0, factor=32.0, original_max_position_embeddings=8192)
    plain, scaled = (inverse_frequencies(spec, 16)[0] for spec in (RopeSpec(theta=500_000.0), rope))
    directory = convert(write_with_divisors(tmp_path / "m.gguf", (plain / scaled).numpy()))
    assert ModelSpec.from_directory(directory).rope == rope


def test_unknown_divisors_are_refused(tmp_path: Path) -> None:
    path = write_with_divisors(tmp_path / "m.gguf", np.linspace(1, 8, 8))
    with pytest.raises(ModelError, match="rope_freqs"):
        convert(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "gemma3"}, ["gemma3", "llama", "qwen2", "qwen3"]),
        ({"llama.expert_count": 8}, ["experts", "8"]),
        ({"llama.block_count": None}, ["llama.block_count"]),
        ({"llama.block_count": 2}, ["blk.2."]),
        ({"llama.block_count": 4}, ["blk.3.", "missing"]),
        ({"llama.rope.dimension_count": 8}, ["8 of 16"]),
        ({"llama.attention.sliding_window": 64}, ["MistralForCausalLM", "sliding_window 64"]),
        ({"tokenizer.ggml.pre": "jais"}, ["pre-tokenizer 'jais'", "smollm", "qwen2"]),
        ({"tokenizer.ggml.model": "t5"}, ["tokenizer 't5'", "gpt2"]),
        ({"tokenizer.ggml.merges": None}, ["merges"]),
        ({"llama.feed_forward_length": 96}, ["ffn_gate", "[112, 64]", "[96, 64]"]),
    ],
)
def test_refused_by_name(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=NUM_TOKENS)
    path = tiny_gguf(tmp_path / "m.gguf", model, **changes)
    with pytest.raises(ModelError) as caught:
        convert(path)
    for word in [*words, "m.gguf"]:
        assert word in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_truncated_file_is_named(share: float, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", tiny_model("llama", vocab_size=NUM_TOKENS))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"m\.gguf"):
        convert(path)


def test_other_content_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text(json.dumps({"not": "gguf"}) * 100)
    with pytest.raises(ModelError, match=r"m\.gguf"):
        convert(path)
