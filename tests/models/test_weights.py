import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import rewrite_json, saved, tiny_model

from kvrelay.errors import ModelError
from kvrelay.models import weights
from kvrelay.models.decoder import load_decoder


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return saved(tiny_model("llama"), tmp_path)


def change(directory: Path, drop: str | None = None, **extra: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file(tensors | extra, path)


def refusal(directory: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_decoder(directory, "cpu", torch.float32)
    return str(caught.value)


def test_missing_tensor_is_named(directory: Path) -> None:
    change(directory, drop="model.layers.1.mlp.up_proj.weight")
    assert "model.layers.1.mlp.up_proj.weight" in refusal(directory)


def test_unexpected_tensor_is_named_with_its_file(directory: Path) -> None:
    change(directory, **{"model.layers.9.mlp.up_proj.weight": torch.zeros(1)})
    message = refusal(directory)
    assert "model.layers.9.mlp.up_proj.weight" in message
    assert "model.safetensors" in message


def test_mis_shaped_tensor_is_named_with_both_shapes(directory: Path) -> None:
    change(directory, **{"model.norm.weight": torch.zeros(63)})
    message = refusal(directory)
    for word in ("model.norm.weight", "[63]", "[64]", "model.safetensors"):
        assert word in message


def test_integer_weights_are_refused(directory: Path) -> None:
    change(directory, **{"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    assert "int8" in refusal(directory)


def test_recomputed_buffers_and_a_tied_head_are_ignored(directory: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "lm_head.weight": torch.zeros(97, 64),
    }
    change(directory, **extra)
    decoder = load_decoder(directory, "cpu", torch.float32)
    assert decoder.head is decoder.embedding
    assert decoder.head.abs().sum() > 0


@pytest.mark.parametrize("keep_bytes", [0, 4, 100, -7])
def test_truncated_file_is_named(keep_bytes: int, directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    assert "model.safetensors" in refusal(directory)


def test_no_weights_at_all(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(directory)


def test_pickles_are_never_loaded(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    message = refusal(directory)
    assert "pytorch_model.bin" in message
    assert "pickled" in message


def test_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tiny_model("llama"), tmp_path, "60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path)


def test_index_cannot_reach_outside_its_directory(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is not the name of a safetensors file" in refusal(directory)


def test_index_without_a_map_is_named(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json" in refusal(directory)


def test_config_that_does_not_fit_the_weights(directory: Path) -> None:
    rewrite_json(directory / "config.json", num_hidden_layers=4)
    assert "model.layers.3." in refusal(directory)


def test_weights_of_equal_shapes_are_told_apart_by_any_byte(directory: Path) -> None:
    first = weights.weights_digest(directory)
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert weights.weights_digest(directory) != first
    data[-1] ^= 1
    path.write_bytes(data)
    assert weights.weights_digest(directory) == first


def test_weights_too_many_to_be_read_whole_are_told_apart_by_a_change_all_over_any_tensor(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 64)
    monkeypatch.setattr(weights, "DIGESTED_BYTES", path.stat().st_size // 20)
    (header, *chunks) = weights._samples(path, 64 * 20)
    assert max(map(len, chunks)) == 64
    assert sum(map(len, chunks)) < path.stat().st_size // 5
    found = {weights.weights_digest(directory)}
    for name, tensor in tensors.items():
        tuned = tensor.clone()
        tuned.flatten()[-2 * 64 * 20 // tensor.itemsize :] *= 1.001  # all of a small one, a large one's end
        save_file(tensors | {name: tuned}, path)
        found.add(weights.weights_digest(directory))
    assert len(found) == 1 + len(tensors)
    assert header[8:9] == b"{"
