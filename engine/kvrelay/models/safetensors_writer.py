"""Writes a bfloat16 safetensors file one tensor at a time, so that memory holds one tensor, not the model.

Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, JSON header, raw data).
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

NUM_BYTES = 2  # of one bfloat16


def write_bfloat16(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, "np.ndarray[Any, Any]"]],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write float32 `tensors`, rounded to bfloat16, in the order of `shapes`; `advance` hears bytes written.

    `tensors` must yield exactly the names of `shapes`, in the same order and with those shapes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * NUM_BYTES
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for (name, shape), (found, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (name, shape) == (found, tensor.shape), (name, shape, found, tensor.shape)
            file.write(to_bfloat16_bits(tensor).tobytes())
            advance(tensor.size * NUM_BYTES)


def to_bfloat16_bits(tensor: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Round finite float32 values to the nearest bfloat16, ties to even; returns the bits as uint16.

    bfloat16 is the upper half of float32: add just under half a unit, plus one when the kept half is odd.
    """
    import numpy as np

    bits = np.ascontiguousarray(tensor, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
