"""Converts a Llama-family GGUF file, once, into a Hugging Face directory. No torch; `gguf` when called.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensor names and the order of rotary rows are
those of llama.cpp's `convert_hf_to_gguf.py`, undone here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrelay.errors import ModelError
from kvrelay.models.gguf_config import config_from_metadata, generation_config
from kvrelay.models.gguf_tokenizer import write_tokenizer
from kvrelay.models.parameters import Shape, parameter_shapes
from kvrelay.models.progress import Progress, silent
from kvrelay.models.safetensors_writer import NUM_BYTES, write_bfloat16
from kvrelay.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np

_ROOT_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert_gguf(gguf_path: Path, directory: Path, progress: Progress = silent) -> None:
    """Write config, bfloat16 safetensors, tokenizer and chat template into the empty `directory`.

    Every quantisation the `gguf` package can dequantise is read. Raises `ModelError`, naming the file, when
    it is corrupt, not of a supported architecture, or holds tensors or a tokenizer that we cannot convert.
    """
    metadata, tensors = read_gguf(gguf_path)
    config = config_from_metadata(metadata, tensors, gguf_path)
    generation = generation_config(metadata)
    spec = ModelSpec.from_config(config, generation, gguf_path)
    shapes = parameter_shapes(spec)
    _check_tensors(shapes, tensors, gguf_path)
    write_tokenizer(metadata, directory, gguf_path)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    total = NUM_BYTES * sum(_size(shape) for shape in shapes.values())
    with progress(f"converting {gguf_path.name}", total) as advance:
        stream = _parameters(spec, shapes, metadata["general.architecture"], tensors, gguf_path)
        write_bfloat16(directory / "model.safetensors", shapes, stream, advance)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (metadata key -> value, tensor name -> `gguf.ReaderTensor`); `ModelError` when unreadable."""
    from gguf import GGUFReader

    if not path.is_file():
        raise ModelError(f"no GGUF file at {path}")
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}") from error
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a parameter: `model.layers.3.mlp.up_proj.bias` -> `blk.3.ffn_up.bias`."""
    stem, suffix = name.rsplit(".", 1)
    if stem in _ROOT_NAMES:
        return f"{_ROOT_NAMES[stem]}.{suffix}"
    layer, module = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{suffix}"


def _size(shape: Shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _check_tensors(shapes: dict[str, Shape], tensors: dict[str, Any], path: Path) -> None:
    wanted = {gguf_name(name): shape for name, shape in shapes.items()}
    # rope_freqs became config.json's rope parameters; the output matrix of a tied model is not written
    extra = sorted(set(tensors) - set(wanted) - {"rope_freqs.weight"})
    if extra:
        raise ModelError(
            f"{path}: {len(extra)} tensors have no place in the architecture, first {extra[0]!r}"
        )
    for name, shape in wanted.items():
        if name not in tensors:
            raise ModelError(f"{path}: tensor {name!r} is missing")
        found = tuple(int(length) for length in reversed(tensors[name].shape))
        if found != shape:
            raise ModelError(f"{path}: tensor {name!r} has shape {list(found)}, expected {list(shape)}")


def _parameters(
    spec: ModelSpec, shapes: dict[str, Shape], architecture: str, tensors: dict[str, Any], path: Path
) -> Iterator[tuple[str, "np.ndarray[Any, Any]"]]:
    heads = {"self_attn.q_proj": spec.num_q_heads, "self_attn.k_proj": spec.num_kv_heads}
    for name, shape in shapes.items():
        values = _dequantised(tensors[gguf_name(name)], path).reshape(shape)
        num_heads = next((count for module, count in heads.items() if f".{module}." in name), None)
        if architecture == "llama" and num_heads is not None:
            values = halves_from_pairs(values, num_heads)
        yield name, values


def _dequantised(tensor: Any, path: Path) -> "np.ndarray[Any, Any]":
    import numpy as np
    from gguf.quants import dequantize

    try:
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except (NotImplementedError, ValueError) as error:
        kind = tensor.tensor_type.name
        raise ModelError(
            f"{path}: cannot dequantise tensor {tensor.name!r} of type {kind}: {error}"
        ) from error


def halves_from_pairs(values: "np.ndarray[Any, Any]", num_heads: int) -> "np.ndarray[Any, Any]":
    """Undo llama.cpp's row order of q and k: [num_heads * head_dim, ...] -> the same shape.

    llama.cpp rotates neighbours (2i, 2i + 1); Hugging Face rotates halves (i, i + head_dim / 2). Inverse of
    `LlamaModel.permute` in convert_hf_to_gguf.py.
    """
    half = values.shape[0] // num_heads // 2
    pairs = values.reshape(num_heads, half, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
