"""Tiny random models written by transformers, and a dense in-memory `attend` to run ours on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from kvrelay.models.decoder import Decoder
from kvrelay.models.native import NativeDecoder

VOCAB = 97
MAX_POSITIONS = 256
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1, "num_hidden_layers": 2}),
    "mistral": ("Mistral", {"head_dim": 24, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-explicit": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.9,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
}


def tiny_model(architecture: str, rope: str = "default", **overrides: Any) -> Any:
    """Return a float32 transformers model whose every parameter, biases and norms too, is random."""
    family, options = ARCHITECTURES[architecture]
    parameters = {"rope_theta": 1000.0, **ROPES[rope]}
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**BASE | options | {"rope_parameters": parameters} | overrides)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.25)
    return model


def saved(model: Any, directory: Path, max_shard_size: str = "1GB") -> Path:
    """Write `model` as a Hugging Face directory."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def rewrite_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


class DenseSequences:
    """Runs a decoder on several sequences at once, keeping keys and values in plain tensors."""

    def __init__(self, decoder: Decoder | NativeDecoder, num_sequences: int) -> None:
        empty = torch.empty(0, decoder.spec.num_kv_heads, decoder.spec.head_dim, dtype=decoder.dtype)
        self.decoder = decoder
        self.cache = [[(empty, empty)] * num_sequences for _ in range(decoder.spec.num_layers)]
        self.lengths = [0] * num_sequences

    def forward(self, batch: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """Feed (sequence, new tokens) pairs in one flat call; returns each pair's logits [tokens, vocab]."""
        counts = [len(tokens) for _, tokens in batch]
        token_ids = torch.tensor([token for _, tokens in batch for token in tokens])
        positions = torch.cat([torch.arange(len(new)) + self.lengths[index] for index, new in batch])

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            parts = zip(batch, q.split(counts), k.split(counts), v.split(counts), strict=True)
            return torch.cat([self._attend_one(layer, index, *qkv) for (index, _), *qkv in parts])

        hidden = self.decoder.forward(token_ids, positions, attend)
        for index, new in batch:
            self.lengths[index] += len(new)
        return list(self.decoder.logits(hidden).split(counts))

    def _attend_one(
        self, layer: int, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        old_k, old_v = self.cache[layer][index]
        k, v = torch.cat((old_k, k)), torch.cat((old_v, v))
        self.cache[layer][index] = (k, v)
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        heads_first = (x.transpose(0, 1) for x in (q, k, v))
        return scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(0, 1)


def greedy(
    decoder: Decoder | NativeDecoder, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    """Return `num_tokens` greedy tokens for each prompt, all sequences decoded together, ends ignored."""
    sequences = DenseSequences(decoder, len(prompts))
    outputs: list[list[int]] = [[] for _ in prompts]
    batch: list[tuple[int, Sequence[int]]] = list(enumerate(prompts))
    for _ in range(num_tokens):
        logits = sequences.forward(batch)
        for output, rows in zip(outputs, logits, strict=True):
            output.append(int(rows[-1].argmax()))
        batch = [(index, output[-1:]) for index, output in enumerate(outputs)]
    return outputs
