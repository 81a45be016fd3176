"""Which NVIDIA boards there are, and which of them a worker's device name means.

Knows NVML handles and CUDA's numbering. Knows nothing of joules. The library is passed in as `nvml`, the
module `pynvml` or a stand-in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay.energy.records import WorkerSite
from kvrelay.errors import EnergyUnavailable

ADVICE = "give the board's UUID (nvidia-smi -L) as the worker's device"


@dataclass(frozen=True, slots=True)
class Board:
    """One GPU as NVML shows it, in PCI bus order."""

    uuid: str
    model: str
    handle: Any


def load_nvml() -> Any:
    """The `pynvml` module. Raises `EnergyUnavailable` with the remedy."""
    try:
        import pynvml
    except ImportError as error:
        raise EnergyUnavailable("nvml: no module pynvml; pip install 'kvrelay[nvml]'") from error
    return pynvml


def start_nvml(nvml: Any) -> None:
    """Initialises the library. Raises `EnergyUnavailable` without a driver."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise EnergyUnavailable(
            f"nvml: {error}; install the NVIDIA driver, or expose it to this container"
        ) from error


def list_boards(nvml: Any) -> list[Board]:
    """Every board of the host. Raises `EnergyUnavailable` when there is none."""
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        boards = [
            Board(_text(nvml.nvmlDeviceGetUUID(h)), _text(nvml.nvmlDeviceGetName(h)), h) for h in handles
        ]
    except nvml.NVMLError as error:
        raise EnergyUnavailable(f"nvml: listing boards failed: {error}") from error
    if not boards:
        raise EnergyUnavailable("nvml: the driver shows no board")
    return boards


def board_of(site: WorkerSite, boards: Sequence[Board]) -> Board:
    """The board that a worker's device name means, with CUDA_VISIBLE_DEVICES applied.

    Raises `EnergyUnavailable` when the device is no GPU, does not exist, is a MIG slice (its counter is the
    whole board's), or is an index among boards of several models, which CUDA and NVML number differently
    (CUDA_DEVICE_ORDER, https://docs.nvidia.com/cuda/cuda-c-programming-guide/#env-vars).
    """
    who = f"nvml: worker {site.worker_id!r} on {site.device!r}"
    if not site.on_cuda:
        raise EnergyUnavailable(f"{who}: not an NVIDIA board")
    name = _device_entry(site, who)
    if name.startswith("MIG-"):
        raise EnergyUnavailable(f"{who}: a MIG slice has no energy counter of its own")
    if not name.isdecimal():
        matches = [board for board in boards if board.uuid.startswith(name)]
        if len(matches) != 1:
            raise EnergyUnavailable(f"{who}: {name!r} names {len(matches)} of {[b.uuid for b in boards]}")
        return matches[0]
    if len({board.model for board in boards}) > 1:
        raise EnergyUnavailable(f"{who}: boards of several models have no common numbering; {ADVICE}")
    if int(name) >= len(boards):
        raise EnergyUnavailable(f"{who}: needs board {name}, there are {len(boards)}")
    return boards[int(name)]


def _device_entry(site: WorkerSite, who: str) -> str:
    if not site.device.startswith("cuda"):
        return site.device
    index = site.device.removeprefix("cuda").removeprefix(":") or "0"
    if not index.isdecimal():
        raise EnergyUnavailable(f"{who}: expected cuda, cuda:N or a UUID")
    if site.visible_devices is None:
        return index
    visible = [entry.strip() for entry in site.visible_devices.split(",")]
    shown = visible[: next((i for i, entry in enumerate(visible) if entry in ("", "-1")), len(visible))]
    if int(index) >= len(shown):
        raise EnergyUnavailable(
            f"{who}: CUDA_VISIBLE_DEVICES={site.visible_devices!r} shows {len(shown)} boards"
        )
    return shown[int(index)]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
