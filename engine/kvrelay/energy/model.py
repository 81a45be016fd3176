"""Modelled energy: declared watts and the CPU time of each worker process. Nothing here is measured.

joules = idle_w * dt + (busy_w - idle_w) * utilisation * dt, the linear power model of Fan, Weber and
Barroso (ISCA 2007, https://doi.org/10.1145/1250662.1250665); utilisation = CPU time / (dt * threads).
On a GPU, CPU time says little of the board: there only the bounds idle_w * t and busy_w * t are sure.
"""

import os
from collections.abc import Callable, Sequence

from kvrelay.energy.power_model import PowerModel
from kvrelay.energy.records import Domain, WorkerSite
from kvrelay.errors import EnergyUnavailable, InvalidConfig

CLOCK_TICK_S = 0.01  # the kernel counts CPU time in ticks: what exceeds full use for a moment is carried over

CpuSeconds = Callable[[int], float | None]


class ModelMeter:
    """Joules per worker under the user's watts; each worker is its own domain, named after it.

    `cpu_seconds(pid)` gives a process's user and system CPU seconds, or None when it has gone: from then on
    it draws nothing. Raises `InvalidConfig` when the watts do not fit the workers.
    """

    def __init__(self, sites: Sequence[WorkerSite], power_model: PowerModel, cpu_seconds: CpuSeconds) -> None:
        power_model.check_keys(sites)
        self.why = "asked for by name"
        self._label = power_model.label
        self._workers = {site.worker_id: _Worker(site, power_model, cpu_seconds) for site in sites}
        if len(self._workers) < len(sites):
            raise InvalidConfig(f"two workers share an id among {[site.worker_id for site in sites]}")
        self._sampled_s: float | None = None

    @classmethod
    def open(cls, sites: Sequence[WorkerSite], power_model: PowerModel | None) -> "ModelMeter":
        """Opens with psutil's CPU times. Raises `EnergyUnavailable` when no watts were declared."""
        if power_model is None:
            raise EnergyUnavailable("model: no watts declared; give --power-model idle_w=5,busy_w=20")
        return cls(sites, power_model, process_cpu_seconds())

    @classmethod
    def probe(cls) -> str:
        """Whether CPU time can be read. Raises `EnergyUnavailable`."""
        process_cpu_seconds()(os.getpid())
        return "ready once watts are declared: --power-model idle_w=5,busy_w=20"

    @property
    def source(self) -> str:
        """`model(...)` with the declared watts spelled out."""
        return self._label

    @property
    def domains(self) -> tuple[Domain, ...]:
        """One per worker, with its watts."""
        return tuple(worker.domain for worker in self._workers.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Workers that have gone."""
        gone = [worker_id for worker_id, worker in self._workers.items() if worker.gone]
        return (f"processes of {gone} have gone: no power is modelled for them since",) if gone else ()

    def sample(self, now_s: float) -> dict[str, float]:
        """Modelled joules per worker since the first sample."""
        elapsed_s = 0.0 if self._sampled_s is None else now_s - self._sampled_s
        self._sampled_s = now_s
        return {worker_id: worker.advance(elapsed_s) for worker_id, worker in self._workers.items()}

    def close(self) -> None:
        """Nothing is held open."""


class _Worker:
    def __init__(self, site: WorkerSite, power_model: PowerModel, cpu_seconds: CpuSeconds) -> None:
        watts = power_model.watts_of(site)
        self.domain = Domain(
            name=site.worker_id, worker_ids=(site.worker_id,), idle_w=watts.idle_w, busy_w=watts.busy_w
        )
        self.gone = False
        self._watts, self._pid, self._cpu_seconds = watts, site.pid, cpu_seconds
        self._num_threads = site.num_threads or os.cpu_count() or 1
        self._cpu_s: float | None = None
        self._carried_s = 0.0
        self._joules = 0.0

    def advance(self, elapsed_s: float) -> float:
        cpu_s = self._cpu_seconds(self._pid)
        if cpu_s is None:
            self.gone = True
            return self._joules
        busy_s = self._busy_seconds(0.0 if self._cpu_s is None else cpu_s - self._cpu_s, elapsed_s)
        self._cpu_s = cpu_s
        watts = self._watts
        self._joules += watts.idle_w * elapsed_s + (watts.busy_w - watts.idle_w) * busy_s
        return self._joules

    def _busy_seconds(self, cpu_s: float, elapsed_s: float) -> float:
        """Utilisation x elapsed time; never above the elapsed time, so that the bounds hold."""
        wanted_s = self._carried_s + max(0.0, cpu_s)
        used_s = min(wanted_s, elapsed_s * self._num_threads)
        self._carried_s = min(wanted_s - used_s, CLOCK_TICK_S * self._num_threads)
        return used_s / self._num_threads


def process_cpu_seconds() -> CpuSeconds:
    """A reader of processes' user and system CPU seconds. Raises `EnergyUnavailable` without psutil."""
    try:
        import psutil
    except ImportError as error:
        raise EnergyUnavailable("model: no module psutil; pip install psutil") from error

    def read(pid: int) -> float | None:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            return None
        except psutil.Error as error:
            raise EnergyUnavailable(f"model: CPU time of process {pid} cannot be read: {error}") from error
        return float(times.user + times.system)

    return read
