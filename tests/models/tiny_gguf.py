"""Tiny GGUF files and tokenizers, written as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from kvrelay.models.gguf import gguf_name

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["t h", "th e", "Ġ the", "Ġ a", "i n", "Ċ Ċ", "Ġ Ġ", "Ġ 1", "1 2", "e r", "Ã ©"]
SPECIAL = ["<|end|>", "<|start|>"]
CHAT = "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"


def byte_level_metadata(pre: str, **changes: Any) -> dict[str, Any]:
    """GGUF metadata of a byte-level tokenizer: two control tokens, the 256 bytes, one token per merge."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*SPECIAL, *BYTES, *merged, "<tool>"]
    types = [3, 3, *[1] * (len(BYTES) + len(merged)), 4]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
    }
    return {key: value for key, value in (metadata | changes).items() if value is not None}


def sentence_piece_metadata(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of a SentencePiece tokenizer with byte fallback."""
    pieces = ["▁t", "he", "▁the", "in", "▁a", "er", "▁in", "▁▁"]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,!"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    num_tail = len(pieces) + len(letters)
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(num_tail)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * num_tail],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return {key: value for key, value in (metadata | changes).items() if value is not None}


def size_metadata(config: Any, architecture: str) -> dict[str, Any]:
    """GGUF metadata of the sizes in a transformers config."""
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.key_length": config.hidden_size // config.num_attention_heads,
    }
    return {f"{architecture}.{key}": value for key, value in sizes.items()}


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]], quantized: str = ""
) -> Path:
    """Write a float32 GGUF file; tensors whose name contains `quantized`, if given, are stored as Q8_0."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(key, value)
    for name, values in tensors.items():
        if quantized and quantized in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: Any, architecture: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return a transformers model's parameters under llama.cpp's names and, for llama, in its row order."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.numpy()
        count = next((count for module, count in heads.items() if f".{module}." in name), None)
        if architecture == "llama" and count is not None:  # LlamaModel.permute in convert_hf_to_gguf.py
            halves = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        found[gguf_name(name)] = values
    return found


def tiny_gguf(
    path: Path, model: Any, architecture: str = "llama", quantized: str = "", **changes: Any
) -> Path:
    """Write `model` (vocabulary of `byte_level_metadata`) as a GGUF file; `changes` replace metadata."""
    base = byte_level_metadata("smollm") | {"general.architecture": architecture}
    metadata = base | size_metadata(model.config, architecture) | changes
    kept = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, kept, gguf_tensors(model, architecture), quantized)


NUM_TOKENS = len(byte_level_metadata("smollm")["tokenizer.ggml.tokens"])
