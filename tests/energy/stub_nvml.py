"""A stand-in for the module `pynvml` whose boards draw a given power on a given clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Watts = Callable[[float], float]


class NVMLError(Exception):
    """The root of NVML's errors, as in pynvml."""


@dataclass
class StubBoard:
    """One board: joules since driver load and watts now, as functions of time.

    `step_s` is the time between two updates of the counter, `modulus_mj` where it wraps, `start_mj` where
    it stands at time 0.
    """

    uuid: str
    joules: Callable[[float], float]
    watts: Watts | None = None
    model: str = "Stub 100"
    step_s: float = 0.0
    start_mj: int = 0
    modulus_mj: int = 2**64
    has_counter: bool = True

    def energy_mj(self, now_s: float) -> int:
        """The counter as a program would read it at `now_s`."""
        if self.step_s:
            now_s = (now_s + 1e-9) // self.step_s * self.step_s
        return (self.start_mj + round(self.joules(now_s) * 1e3)) % self.modulus_mj


class StubNvml:
    """The functions of `pynvml` that are used, on a clock the test sets."""

    NVMLError = NVMLError

    def __init__(self, boards: Sequence[StubBoard], driver: bool = True) -> None:
        self.boards = list(boards)
        self.now_s = 0.0
        self.num_open = 0
        self.driver = driver
        self.lost = False

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("Driver Not Loaded")
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> StubBoard:
        return self.boards[index]

    def nvmlDeviceGetUUID(self, handle: StubBoard) -> bytes:
        return handle.uuid.encode()

    def nvmlDeviceGetName(self, handle: StubBoard) -> str:
        return handle.model

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: StubBoard) -> int:
        if self.lost:
            raise NVMLError("GPU is lost")
        if not handle.has_counter:
            raise NVMLError("Not Supported")
        return handle.energy_mj(self.now_s)

    def nvmlDeviceGetPowerUsage(self, handle: StubBoard) -> int:
        if handle.watts is None:
            raise NVMLError("Not Supported")
        return round(handle.watts(self.now_s) * 1e3)


def constant_board(watts: float, uuid: str = "GPU-a", **options: object) -> StubBoard:
    """A board that always draws the same: joules are watts * t."""
    return StubBoard(uuid, lambda t: watts * t, lambda t: watts, **options)  # type: ignore[arg-type]


def ramp_board(watts_per_s: float, uuid: str = "GPU-a", **options: object) -> StubBoard:
    """A board whose power grows from 0: joules are watts_per_s * t^2 / 2."""
    return StubBoard(uuid, lambda t: watts_per_s * t * t / 2, lambda t: watts_per_s * t, **options)  # type: ignore[arg-type]
