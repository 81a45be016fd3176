"""Finds the implementation of an operation: one asked for by name runs or raises, ``auto`` picks the best."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from kvrelay_kernels.cpu.native.library import why_not as why_not_native
from kvrelay_kernels.errors import KernelUnavailable, UnknownName

PACKAGES = {
    "reference": "reference",
    "cpu-native": "cpu.native",
    "cpu-torch": "cpu.batched",
    "triton": "triton",
}
IMPLEMENTATIONS = ("cpu", *PACKAGES)
"""``cpu`` stands for ``cpu-native`` where that can run, else ``cpu-torch``."""


def implementation(operation: str, impl: str, like: Tensor) -> Callable[..., Any]:
    """The function ``operation`` of ``impl``, ``auto`` included, for tensors like ``like [..., head_dim]``.

    Raises UnknownName for a name that is none, KernelUnavailable with the reason for one that cannot run
    here.
    """
    name = resolve(operation, impl, like)
    reason = _why_not(operation, name, like)
    if reason is not None:
        raise KernelUnavailable(f"{operation}: implementation {name!r} cannot run: {reason}")
    function: Callable[..., Any] = getattr(import_module(_module(name, operation)), operation)
    return function


def chosen_implementation(operation: str, like: Tensor) -> str:
    """What ``auto`` takes for ``operation`` on a tensor: its device's own kernels, else the reference."""
    preferred = "triton" if like.is_cuda else _cpu(operation, like)
    return preferred if _why_not(operation, preferred, like) is None else "reference"


def resolve(operation: str, impl: str, like: Tensor) -> str:
    """The implementation that ``impl`` (perhaps ``auto`` or ``cpu``) stands for."""
    match impl:
        case "auto":
            return chosen_implementation(operation, like)
        case "cpu":
            return _cpu(operation, like)
    return impl


def _cpu(operation: str, like: Tensor) -> str:
    return "cpu-native" if _why_not(operation, "cpu-native", like) is None else "cpu-torch"


def _why_not(operation: str, name: str, like: Tensor) -> str | None:
    if name not in PACKAGES:
        raise UnknownName(f"unknown implementation {name!r}; expected 'auto' or one of {IMPLEMENTATIONS}")
    if name == "triton" and find_spec("triton") is None:
        return "the triton package is not installed"
    if name == "triton" and not like.is_cuda and not _interpreted():
        return f"tensors are on {like.device}, needed cuda (or TRITON_INTERPRET=1 from the start, to debug)"
    if name.startswith("cpu") and like.device.type != "cpu":
        return f"tensors are on {like.device}, needed cpu"
    if name == "cpu-native" and (reason := why_not_native(like.dtype, like.shape[-1])):
        return reason
    if not _is_there(name, operation):
        return f"this version has no {name} kernel of it"
    return None


@cache
def _is_there(name: str, operation: str) -> bool:
    module = _module(name, operation)
    return find_spec(module.rpartition(".")[0]) is not None and find_spec(module) is not None


def _module(name: str, operation: str) -> str:
    return f"kvrelay_kernels.{PACKAGES[name]}.{operation}"


def _interpreted() -> bool:
    """Whether Triton's own switch makes its kernels run on the CPU; only a debugging aid."""
    return bool(import_module("triton").knobs.runtime.interpret)
