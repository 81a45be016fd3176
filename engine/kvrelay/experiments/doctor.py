"""What this host has for us, and for each thing that is missing the reason and what to install."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import msgspec
import psutil

from kvrelay.energy import doctor as meters
from kvrelay.models.hub import pulled
from kvrelay.transport import TRANSPORTS


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked for. `detail` says what was found, or why not and what to do."""

    area: str
    name: str
    available: bool
    detail: str


def examine(home: Path) -> list[Finding]:
    """Look at devices, energy meters, transports, kernels, compilers and models. Imports torch."""
    return [*_devices(), *_meters(), *_transports(), *_kernels(), *_compilers(), *_models(home)]


def _devices() -> list[Finding]:
    import torch

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    detail = (
        f"{cores} cores, {capability}, {memory.available / 2**30:.1f} GiB free, torch {torch.__version__}"
    )
    found = [Finding(area="device", name="cpu", available=True, detail=detail)]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"built for CUDA {built}, but no board or driver" if built else "a CPU build of torch"
        detail = f"{reason}; for a GPU install the NVIDIA driver and a CUDA build of torch"
        return [*found, Finding(area="device", name="cuda", available=False, detail=detail)]
    for index in range(torch.cuda.device_count()):
        board = torch.cuda.get_device_properties(index)
        detail = f"{board.name}, {board.total_memory / 2**30:.0f} GiB, sm_{board.major}{board.minor}"
        found.append(Finding(area="device", name=f"cuda:{index}", available=True, detail=detail))
    return found


def _meters() -> list[Finding]:
    return [
        Finding(area="energy meter", name=meter.name, available=meter.available, detail=meter.detail)
        for meter in meters()
    ]


def _transports() -> list[Finding]:
    reasons = {}
    if not sys.platform.startswith("linux"):
        reasons["shm"] = f"needs Linux memfd; this is {sys.platform}"
    if find_spec("nixl") is None:
        reasons["nixl"] = "not installed: pip install 'kvrelay[nixl]'"
    return [
        Finding(area="transport", name=name, available=name not in reasons, detail=reasons.get(name, "ready"))
        for name in TRANSPORTS
    ]


def _kernels() -> list[Finding]:
    from kvrelay_kernels import cpu_backend

    backend = cpu_backend()
    build = (
        "in C++" if backend != "torch" else "batched torch; a C++ compiler at install gives the faster ones"
    )
    if backend != "torch":
        build += ", the layers of models and their decode steps too (model_impl='native')"
    dense = "these" if backend != "torch" else "torch's own attention over gathered pages"
    detail = f"{backend}: {build}; dense attention of float32 and bfloat16 by {dense}"
    cpu = Finding(area="kernels", name="cpu", available=True, detail=detail)
    triton = find_spec("triton") is not None
    detail = (
        "installed" if triton else "not installed; pip install triton (it comes with CUDA builds of torch)"
    )
    return [cpu, Finding(area="kernels", name="triton", available=triton, detail=detail)]


def _compilers() -> list[Finding]:
    path = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    detail = (
        path or "none found; the CPU kernels' batched-torch path is used (install g++ for the faster one)"
    )
    return [Finding(area="compiler", name="C++", available=path is not None, detail=detail)]


def _models(home: Path) -> list[Finding]:
    found = [
        Finding(
            area="model",
            name=model.name,
            available=True,
            detail=f"{model.num_bytes / 1e6:.0f} MB, {model.source}",
        )
        for model in pulled(home)
    ]
    nothing = "none pulled yet; kvrelay models pull smollm2-135m-instruct"
    return found or [Finding(area="model", name="(any)", available=False, detail=nothing)]
