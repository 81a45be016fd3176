"""The nouns of energy: where workers run, which physical counters exist, what a worker was doing when.

Knows nothing of how joules are read or split.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kvrelay.errors import ProtocolError
from kvrelay.types import PHASES, Phase, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSite:
    """One worker process and the device it computes on, as a meter must know them.

    `device` is `cpu`, `cuda`, `cuda:N` or a board's UUID (`GPU-...`). `visible_devices` is the value of
    CUDA_VISIBLE_DEVICES in that worker's environment, None when unset: without it `cuda:0` would name
    another board. `num_threads` (compute threads; None = every core the host has) is what the modelled
    meter calls full use.
    """

    worker_id: str
    pid: int
    device: str
    role: Role = "colocated"
    num_threads: int | None = None
    visible_devices: str | None = None

    @property
    def on_cuda(self) -> bool:
        """True for any spelling of a CUDA device."""
        return self.device.startswith(("cuda", "GPU-", "MIG-"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One physical energy counter (a board, a CPU package) and the workers that draw from it.

    `min_update_s` is the shortest time between two independent readings, where the meter knows it.
    `idle_w` and `busy_w` are declared watts: present for a modelled domain only.
    """

    name: str
    worker_ids: tuple[str, ...]
    min_update_s: float = 0.0
    idle_w: float | None = None
    busy_w: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What one worker did during one step of one phase; fields are those of `wire.StepReport`.

    `start_s` and `end_s` are `time.monotonic()` seconds, comparable between processes of one host. `cpu_s`
    is the process's CPU time in the step. `num_tokens` is the weight of each request id in it.

    Raises `ProtocolError`, naming the field, when a value makes no sense.
    """

    worker_id: str
    phase: Phase
    start_s: float
    end_s: float
    num_tokens: Mapping[str, int]
    cpu_s: float = 0.0

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ProtocolError(f"activity phase={self.phase!r}: expected one of {list(PHASES)}")
        if not (math.isfinite(self.start_s) and math.isfinite(self.end_s) and self.start_s <= self.end_s):
            raise ProtocolError(f"activity start_s={self.start_s}, end_s={self.end_s}: expected start <= end")
        if not (math.isfinite(self.cpu_s) and self.cpu_s >= 0.0):
            raise ProtocolError(f"activity cpu_s={self.cpu_s}: expected finite seconds >= 0")
        if any(count < 0 for count in self.num_tokens.values()):
            raise ProtocolError(f"activity num_tokens={dict(self.num_tokens)}: expected counts >= 0")


@dataclass(frozen=True, slots=True)
class Interval:
    """Time between two updates of one domain's counter, in monotonic seconds, and the joules it counted."""

    start_s: float
    end_s: float
    joules: float
