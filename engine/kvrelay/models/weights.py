"""Reads the safetensors of a Hugging Face directory, one tensor at a time. Never unpickles anything."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from kvrelay.errors import ModelError
from kvrelay.models.json_file import read_json_object
from kvrelay.models.parameters import Shape

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# buffers that old checkpoints store and every implementation recomputes
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
DIGESTED_BYTES = 512 << 20  # at 0.7 to 1.5 GB per second
CHUNK_BYTES = 64 << 10


class Weights:
    """The tensors of one checkpoint by name; files stay mapped while this object lives."""

    def __init__(self, directory: Path) -> None:
        """Open `model.safetensors`, or the shards `model.safetensors.index.json` lists.

        Raises `ModelError` naming the file that is missing, corrupt, or pickled instead of safetensors.
        """
        self._files = {path: _open(path) for path in _weight_files(directory)}
        self._paths = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118
        self._directory = directory

    def check(self, shapes: Mapping[str, Shape], optional: frozenset[str] = frozenset()) -> None:
        """Raise `ModelError`, naming tensor and file, unless the checkpoint holds exactly `shapes`.

        Names in `optional` may be there and are not read.
        """
        if missing := [name for name in shapes if name not in self._paths]:
            raise ModelError(f"{self._directory}: {len(missing)} tensors are missing, first {missing[0]!r}")
        known = shapes.keys() | optional
        extra = sorted(
            name for name in self._paths if name not in known and not name.endswith(_IGNORED_SUFFIX)
        )
        if extra:
            raise ModelError(f"{self._paths[extra[0]]}: {len(extra)} unexpected tensors, first {extra[0]!r}")
        for name, shape in shapes.items():
            found = tuple(self._files[self._paths[name]].get_slice(name).get_shape())
            if found != shape:
                message = f"tensor {name!r} has shape {list(found)}, expected {list(shape)}"
                raise ModelError(f"{self._paths[name]}: {message}")

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU in its stored dtype; `ModelError` when it is not of a float dtype."""
        path = self._paths[name]
        try:
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path}: cannot read tensor {name!r}: {error}") from error
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(
                f"{path}: tensor {name!r} has dtype {tensor.dtype}; only float weights are supported"
            )
        return tensor


def weights_digest(directory: Path) -> bytes:
    """SHA-256 of the weight files' names, headers and tensors, for weights that `Weights` accepts.

    Up to `DIGESTED_BYTES` of weights that is every byte. Of more it is so many bytes in all: of each tensor
    its first 64 KiB and as many again at equal distances. That notices a fine-tune, which changes numbers all
    over the tensors it trains; it may miss an edit that touches a few rows of a large tensor only.
    """
    files = _weight_files(directory)
    total = sum(path.stat().st_size for path in files)
    distance = CHUNK_BYTES * max(1, -(-total // DIGESTED_BYTES))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        for sample in _samples(path, distance):
            digest.update(sample)
    return digest.digest()


def _samples(path: Path, distance: int) -> Iterator[bytes]:
    """The file's header, then `CHUNK_BYTES` at every `distance` of each tensor."""
    with path.open("rb", buffering=0) as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        yield length + header
        tensors: dict[str, Any] = msgspec.json.decode(header)
        for start, end in (tensors[name]["data_offsets"] for name in tensors if name != "__metadata__"):
            for at in range(start, end, distance):
                file.seek(len(length) + len(header) + at)
                yield file.read(min(CHUNK_BYTES, end - at))


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no 'weight_map'")
        return [_inside(directory, shard, index) for shard in sorted(set(weight_map.values()))]
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{directory} holds pickled weights ({pickles[0]}), which can run code and are never loaded; "
            "convert them to safetensors"
        )
    raise ModelError(f"{directory} has neither {_SINGLE} nor {_INDEX}")


def _inside(directory: Path, shard: Any, index: Path) -> Path:
    """A shard must be a plain file name: an index must not reach outside its directory."""
    if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
        raise ModelError(f"{index}: {shard!r} is not the name of a safetensors file")
    return directory / shard


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"missing file {path}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
