"""Energy of NVIDIA boards through NVML: the board's own energy counter, or its power integrated over time.

Needs `nvidia-ml-py` (imported only when opened) and a driver; no torch, no CUDA.
`nvmlDeviceGetTotalEnergyConsumption`: millijoules since the driver was loaded, Volta and later
(https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html). A board's figure covers everything
that runs on it and nothing of the host.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kvrelay.energy.counter import WrappingCounter
from kvrelay.energy.nvml_boards import Board, board_of, list_boards, load_nvml, start_nvml
from kvrelay.energy.power_model import PowerModel
from kvrelay.energy.records import Domain, WorkerSite
from kvrelay.errors import EnergyUnavailable

COUNTER_MODULI_MJ = (2**32, 2**64)
MAX_BOARD_W = 3000.0
REFRESH_S = 0.1  # slowest refresh of a power reading seen on boards since Volta


class NvmlMeter:
    """Joules per board; `nvml-counter` if every board used has an energy counter, otherwise `nvml-power`.

    `nvml-power` is the trapezoid rule over `nvmlDeviceGetPowerUsage`, which many boards average over a
    second: good for long windows, blunt for single requests. `nvml` is the module `pynvml` or a stand-in.

    Raises `EnergyUnavailable` when a worker's board cannot be found or read.
    """

    def __init__(self, sites: Sequence[WorkerSite], nvml: Any) -> None:
        self.why = "asked for by name"
        self._nvml = nvml
        start_nvml(nvml)
        try:
            users = _users_by_board(sites, list_boards(nvml))
            self._lacking = _why_no_counter(nvml, [board for board, _ in users.values()])
            reading = _Power if self._lacking else _Counter
            self._readings = {uuid: reading(nvml, board.handle) for uuid, (board, _) in users.items()}
            self._domains = _domains(users, REFRESH_S if self._lacking else 0.0)
        except BaseException:
            nvml.nvmlShutdown()
            raise

    @classmethod
    def open(cls, sites: Sequence[WorkerSite], power_model: PowerModel | None) -> "NvmlMeter":
        """Opens the boards that `sites` run on; declared watts are not used. Raises `EnergyUnavailable`."""
        return cls(sites, load_nvml())

    @classmethod
    def probe(cls) -> str:
        """The boards of this host and how they are read. Raises `EnergyUnavailable`."""
        return describe(load_nvml())

    @property
    def source(self) -> str:
        """`nvml-counter` or `nvml-power`."""
        return "nvml-power" if self._lacking else "nvml-counter"

    @property
    def domains(self) -> tuple[Domain, ...]:
        """One per board in use, named by its UUID."""
        return self._domains

    @property
    def warnings(self) -> tuple[str, ...]:
        """The fall back to power readings, and counters that were reset meanwhile."""
        found = [f"{self._lacking}: power readings are integrated instead"] if self._lacking else []
        for uuid, reading in self._readings.items():
            if reading.num_resets:
                found.append(
                    f"the counter of {uuid} was reset {reading.num_resets} times; joules are missing"
                )
        return tuple(found)

    def sample(self, now_s: float) -> dict[str, float]:
        """Joules per board since the first sample. Raises `EnergyUnavailable` when a board is lost."""
        try:
            return {uuid: reading.read(now_s) for uuid, reading in self._readings.items()}
        except self._nvml.NVMLError as error:
            raise EnergyUnavailable(f"nvml: reading failed: {error}") from error

    def close(self) -> None:
        """Releases the library."""
        self._nvml.nvmlShutdown()


def describe(nvml: Any) -> str:
    """Number, model and way of reading of the host's boards. Raises `EnergyUnavailable`."""
    start_nvml(nvml)
    try:
        boards = list_boards(nvml)
        lacking = _why_no_counter(nvml, boards)
    finally:
        nvml.nvmlShutdown()
    models = ", ".join(sorted({board.model for board in boards}))
    return f"{len(boards)} x {models}: " + (f"nvml-power ({lacking})" if lacking else "nvml-counter")


class _Counter:
    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._counter = WrappingCounter(COUNTER_MODULI_MJ, units_per_joule=1e3, max_w=MAX_BOARD_W)

    @property
    def num_resets(self) -> int:
        return self._counter.num_resets

    def read(self, now_s: float) -> float:
        raw = int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return self._counter.advance(now_s, raw)


class _Power:
    num_resets = 0

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._last: tuple[float, float] | None = None
        self._joules = 0.0

    def read(self, now_s: float) -> float:
        watts = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
        if self._last is not None:
            last_s, last_w = self._last
            self._joules += 0.5 * (last_w + watts) * (now_s - last_s)
        self._last = (now_s, watts)
        return self._joules


def _users_by_board(
    sites: Sequence[WorkerSite], boards: Sequence[Board]
) -> dict[str, tuple[Board, list[str]]]:
    users: dict[str, tuple[Board, list[str]]] = {}
    for site in sites:
        board = board_of(site, boards)
        users.setdefault(board.uuid, (board, []))[1].append(site.worker_id)
    return users


def _domains(users: Mapping[str, tuple[Board, list[str]]], min_update_s: float) -> tuple[Domain, ...]:
    return tuple(
        Domain(name=uuid, worker_ids=tuple(worker_ids), min_update_s=min_update_s)
        for uuid, (_, worker_ids) in users.items()
    )


def _why_no_counter(nvml: Any, boards: Sequence[Board]) -> str:
    """Empty when every board has an energy counter; raises when one lacks power readings as well."""
    lacking = ""
    for board in boards:
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(board.handle)
        except (AttributeError, nvml.NVMLError) as error:
            lacking = f"{board.model} {board.uuid} has no energy counter ({error})"
    for board in boards if lacking else ():
        try:
            nvml.nvmlDeviceGetPowerUsage(board.handle)
        except nvml.NVMLError as error:
            raise EnergyUnavailable(f"nvml: {lacking}, and no power reading ({error})") from error
    return lacking
