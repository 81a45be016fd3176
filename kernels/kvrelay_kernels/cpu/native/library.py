"""Finds and loads the shared library of the best instruction set, and mirrors ``csrc/api.h``.

Knows the C interface. Knows nothing of operations.
"""

import ctypes
import zlib
from ctypes import c_double, c_float, c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import torch

from kvrelay_kernels.cpu.native.transformer_structs import SIGNATURES as TRANSFORMER_SIGNATURES

INSTRUCTION_SETS = ("avx512", "avx2", "generic")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
CSRC = Path(__file__).parents[3] / "csrc"  # there in a checkout only
HOW_TO_BUILD = "python setup.py build_ext --inplace"


class PagedKVStruct(ctypes.Structure):
    _fields_ = (
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_stride", c_int64 * 3),
        ("v_stride", c_int64 * 3),
        ("block_table", c_void_p),
        ("seq_lens", c_void_p),
        ("table_stride", c_int64),
        ("batch", c_int64),
        ("max_blocks", c_int64),
        ("num_blocks", c_int64),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("dtype", c_int32),
        ("num_threads", c_int32),
    )


class QueriesStruct(ctypes.Structure):
    _fields_ = (
        ("q", c_void_p),
        ("q_stride", c_int64 * 2),
        ("cu_seqlens_q", c_void_p),
        ("total_q", c_int64),
        ("num_q_heads", c_int32),
        ("scale", c_float),
    )


class ListsStruct(ctypes.Structure):
    _fields_ = (
        ("indices", c_void_p),
        ("counts", c_void_p),
        ("cu_q_blocks", c_void_p),
        ("budget", c_int64),
    )


class OutputsStruct(ctypes.Structure):
    _fields_ = (("out", c_void_p), ("lse", c_void_p))


class StatsStruct(ctypes.Structure):
    _fields_ = (
        ("mean", c_void_p),
        ("minimum", c_void_p),
        ("maximum", c_void_p),
        ("spread", c_void_p),
        ("coarse_minimum", c_void_p),
        ("coarse_maximum", c_void_p),
    )


class TreeConfigStruct(ctypes.Structure):
    _fields_ = (
        ("budget", c_int64),
        ("sink_blocks", c_int64),
        ("local_blocks", c_int64),
        ("num_candidates", c_int64),
        ("beam", c_int64),
        ("sampled_queries", c_int64),
        ("sibling_blocks", c_int64),
        ("by_peak", c_int64),
        ("top_p", c_double),
    )


_SIGNATURES = {
    "kvr_prefill": (c_void_p,) * 4,
    "kvr_decode": (c_void_p,) * 4,
    "kvr_merge": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int32, c_int32, c_void_p, c_void_p),
    "kvr_update_stats": (c_void_p,) * 3,
    "kvr_select_tree": (c_void_p,) * 6,
    "kvr_sources": (),
    "kvr_sum_of_weights": (c_void_p, c_int64, c_double),
    **TRANSFORMER_SIGNATURES,
}
_RESULTS = {"kvr_sources": c_uint32, "kvr_sum_of_weights": c_double}  # int32 of all others


@cache
def _load() -> tuple[str, ctypes.CDLL] | None:
    for name in INSTRUCTION_SETS:
        path = Path(__file__).with_name(f"kernels_{name}.so")
        library = load_from(path) if path.exists() else None
        if library is not None and library.kvr_supported():
            return name, library
    return None


def load_from(path: Path) -> ctypes.CDLL | None:
    """The library at ``path`` with its signatures declared.

    None if it is not for this platform, or not made of the sources in ``CSRC`` where these are.
    """
    try:
        loaded = ctypes.CDLL(str(path))
        for name, argument_types in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = argument_types, _RESULTS.get(name, c_int32)
    except (OSError, AttributeError):  # built for another system; built before a function was added
        return None
    return loaded if sources_crc() in (None, loaded.kvr_sources()) else None


def sources_crc() -> int | None:
    """What ``kvr_sources`` of a library of this checkout returns; None where there are no sources."""
    if not (CSRC / "kernels.cpp").exists():
        return None
    return zlib.crc32(
        b"".join(path.read_bytes() for path in [*sorted(CSRC.glob("*.h")), CSRC / "kernels.cpp"])
    )


def library() -> ctypes.CDLL:
    """The loaded library; ``why_not`` must have said None."""
    found = _load()
    assert found is not None
    return found[1]


def instruction_set() -> str | None:
    """``avx512``, ``avx2`` or ``generic``; None if no library was built."""
    found = _load()
    return None if found is None else found[0]


def why_not(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the native kernels cannot run this, or None."""
    if dtype not in DTYPES:
        return f"dtype is {dtype}, needed float32 or bfloat16"
    if head_dim % 8:
        return f"head_dim is {head_dim}, needed a multiple of 8"
    if _load() is None:
        return f"the C++ extension is not built, or not from these sources; install again: {HOW_TO_BUILD}"
    return None
