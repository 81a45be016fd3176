"""SmolLM2-135M-Instruct against transformers, in float32."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import write_gguf
from tiny_models import DenseSequences, greedy
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvrelay.models.decoder import Decoder, load_decoder
from kvrelay.models.spec import ModelSpec
from kvrelay.models.tokenizer import Tokenizer
from real_model import PROMPTS, smollm2_directory

NUM_TOKENS = 64


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return load_decoder(smollm2_directory(), "cpu", torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(smollm2_directory())


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    with torch.no_grad():
        yield AutoModelForCausalLM.from_pretrained(smollm2_directory(), dtype=torch.float32).eval()


def test_spec() -> None:
    spec = ModelSpec.from_directory(smollm2_directory())
    assert (spec.num_layers, spec.num_q_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert (spec.rope.theta, spec.max_position_embeddings, spec.tie_word_embeddings) == (
        100_000.0,
        8192,
        True,
    )
    assert (spec.eos_token_ids, spec.dtype_name) == ((2,), "bfloat16")


def test_greedy_tokens_equal_transformers(decoder: Decoder, tokenizer: Tokenizer, reference: Any) -> None:
    """Each of our tokens is the reference's own choice after the same tokens: so both write the same text."""
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    outputs = greedy(decoder, prompts, NUM_TOKENS)
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        assert output == logits.argmax(-1).tolist()
    assert "Paris" in tokenizer.decode(outputs[0][:8])


@pytest.mark.slow
def test_greedy_tokens_equal_generate(decoder: Decoder, tokenizer: Tokenizer, reference: Any) -> None:
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    outputs = greedy(decoder, prompts, NUM_TOKENS)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        limits = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "eos_token_id": None}
        full = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **limits
        )
        assert output == full[0, len(prompt) :].tolist()


def test_logits_equal_transformers(decoder: Decoder, tokenizer: Tokenizer, reference: Any) -> None:
    token_ids = tokenizer.encode(" ".join(PROMPTS))
    [logits] = DenseSequences(decoder, 1).forward([(0, token_ids)])
    torch.testing.assert_close(logits, reference(torch.tensor([token_ids])).logits[0], rtol=1e-4, atol=1e-3)


TEXTS = [
    *PROMPTS,
    Path(__file__).read_text(encoding="utf-8"),
    "1234567890 3.14e-10 v2.0.1 2024-01-01T00:00:00Z 0x1F",
    "  leading\t\ttabs\n\n\n   and trailing  \r\n",
    "日本語 你好，世界 😀👩‍👩‍👧 é Ω ½ ² Ⅷ ٣٤٥ \u00a0nbsp\u2003em don't I'LL",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
]


def test_tokenizer_equals_transformers(tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2_directory())
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text)
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    messages = [{"role": "user", "content": "Who are you?"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages) == expected
    assert expected.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_tokenizer_equals_what_transformers_reads_from_gguf(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same vocabulary and merges, back in a GGUF file, read by transformers; digits are cut first."""
    stored = json.loads((smollm2_directory() / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = stored["model"]["vocab"]
    control = {token["content"] for token in stored["added_tokens"] if token["special"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in control else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in stored["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "llama.context_length": 8192,
    }
    write_gguf(tmp_path / "t.gguf", metadata, {})
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf").backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, theirs.pre_tokenizer])
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text).ids


def test_streaming_the_real_tokenizer(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        deltas = [*(stream.push([token_id]) for token_id in ids), stream.flush()]
        assert "".join(deltas) == tokenizer.decode(ids)
        assert not any("\ufffd" in delta for delta in deltas)
