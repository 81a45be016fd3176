"""Finds the implementation of an operation: one asked for by name runs or raises, ``auto`` picks the best."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from kvrelay_kernels.errors import KernelUnavailable, UnknownName

IMPLEMENTATIONS = ("reference", "cpu", "triton")


def implementation(operation: str, impl: str, device: torch.device) -> Callable[..., Any]:
    """The function ``operation`` of ``impl``, ``auto`` included.

    Raises UnknownName for a name that is none, KernelUnavailable with the reason for one that cannot run
    here.
    """
    name = chosen_implementation(operation, device) if impl == "auto" else impl
    reason = _why_not(operation, name, device)
    if reason is not None:
        raise KernelUnavailable(f"{operation}: implementation {name!r} cannot run: {reason}")
    function: Callable[..., Any] = getattr(import_module(f"kvrelay_kernels.{name}.{operation}"), operation)
    return function


def chosen_implementation(operation: str, device: torch.device) -> str:
    """What ``auto`` takes for ``operation`` on ``device``: the device's own kernels, else the reference."""
    preferred = "triton" if device.type == "cuda" else "cpu"
    return preferred if _why_not(operation, preferred, device) is None else "reference"


def _why_not(operation: str, name: str, device: torch.device) -> str | None:
    if name not in IMPLEMENTATIONS:
        raise UnknownName(f"unknown implementation {name!r}; expected 'auto' or one of {IMPLEMENTATIONS}")
    if name == "triton" and find_spec("triton") is None:
        return "the triton package is not installed"
    if name == "triton" and device.type != "cuda" and not _interpreted():
        return f"tensors are on {device}, needed cuda (or TRITON_INTERPRET=1 from the start, to debug)"
    if name == "cpu" and device.type != "cpu":
        return f"tensors are on {device}, needed cpu"
    if find_spec(f"kvrelay_kernels.{name}") is None or not _has_module(name, operation):
        return f"this version has no {name} kernel of it"
    return None


def _has_module(name: str, operation: str) -> bool:
    return find_spec(f"kvrelay_kernels.{name}.{operation}") is not None


def _interpreted() -> bool:
    """Whether Triton's own switch makes its kernels run on the CPU; only a debugging aid."""
    return bool(import_module("triton").knobs.runtime.interpret)
