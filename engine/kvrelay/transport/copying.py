"""What a write copies: which bytes of which blocks, checked against the memory on both sides."""

import ctypes
from collections.abc import Iterator, Sequence

import torch

from kvrelay.cache.memory import NUM_VECTORS, KVMemory
from kvrelay.transport.base import Write


def num_bytes(source: KVMemory, write: Write) -> int:
    """Bytes that the write copies."""
    if not write.parts:
        return len(write.source_blocks) * 2 * source.pages[0, 0, 0].nbytes
    heads, head_dim = source.pages.shape[3], source.pages.shape[5]
    if write.parts[0] < 2 * heads:
        return len(write.parts) * source.pages[0, 0, 0, 0].nbytes
    return len(write.parts) * heads * (NUM_VECTORS * head_dim + 1) * source.pages.itemsize


def copy_layer(source: KVMemory, target: KVMemory, write: Write) -> int:
    """Copy the write's blocks between two memories; the number of bytes.

    Raises `IndexError`, before anything is copied, when a layer, part or block lies outside either.
    """
    pages, landing = source.pages, target.pages
    check_inside("layer", [write.layer], min(pages.shape[0], landing.shape[0]))
    check_inside("source block", write.source_blocks, pages.shape[2])
    check_inside("target block", write.target_blocks, landing.shape[2])
    if write.parts:
        has_stats = min(len(source.vectors), len(target.vectors)) > 0
        check_inside("part", write.parts, 2 * pages.shape[3] + has_stats)
        blocks = list(zip(write.source_blocks, write.target_blocks, strict=True))
        return target.copy(source, write.layer, write.parts, blocks)
    for half in range(2):  # K, then V
        stretches = runs(write.source_blocks, write.target_blocks)
        if pages.is_cuda:
            for first, place, count in stretches:
                landing[write.layer, half, place : place + count].copy_(
                    pages[write.layer, half, first : first + count]
                )
        else:
            _copy_in_memory(pages[write.layer, half], landing[write.layer, half], stretches)
    return num_bytes(source, write)


def _copy_in_memory(
    pages: torch.Tensor, landing: torch.Tensor, stretches: Iterator[tuple[int, int, int]]
) -> None:
    """One `memmove` per stretch, the GIL released: a tensor copy of one page costs five times its bytes."""
    size, pages_at, landing_at = pages[0].nbytes, pages.data_ptr(), landing.data_ptr()
    for first_page, first_place, count in stretches:
        ctypes.memmove(landing_at + first_place * size, pages_at + first_page * size, count * size)


def check_inside(what: str, indices: Sequence[int], size: int) -> None:
    """Raise `IndexError` for an index outside 0 to size - 1."""
    if indices and not 0 <= min(indices) <= max(indices) < size:
        raise IndexError(f"{what} {min(indices)} to {max(indices)} lies outside 0 to {size - 1}")


def runs(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Longest stretches where both lists count up by one: (first source, first target, length)."""
    start = 0
    for i in range(1, len(source) + 1):
        if i == len(source) or source[i] != source[i - 1] + 1 or target[i] != target[i - 1] + 1:
            yield source[start], target[start], i - start
            start = i
