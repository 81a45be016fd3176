"""The run's books: steps and energy in, one report out."""

from collections.abc import Sequence

from kvrelay.config import EngineConfig
from kvrelay.metrics import PHASES, Report, phase_report, ratio, worker_report
from kvrelay.router.core import Router
from kvrelay.wire import Heartbeat, Hello, StepReport


class Measurement:
    """Counts what the router's requests cost; lives on the router's thread, but for `close`."""

    def __init__(self, config: EngineConfig, router: Router) -> None:
        self._config, self._router = config, router

    def open(self, hellos: Sequence[Hello]) -> None:
        """The workers are known: start the energy reader."""

    def on_step(self, step: StepReport) -> None:
        """A worker did something."""

    def on_heartbeat(self, beat: Heartbeat) -> None:
        """A worker has reported all it did up to then."""

    def request_energy(self, request_id):
        from kvrelay.outputs import Energy
        return Energy()

    def report(self, now_s: float) -> Report:
        workers = list(self._router.workers.values())
        kv_bytes = sum(worker.kv_bytes for worker in workers)
        busy = sum(worker.busy_s["transfer"] for worker in workers)
        return Report(
            window_s=0, num_requests=dict(self._router.num_ended), num_prompt_tokens=0, num_output_tokens=0,
            output_tokens_per_s=None, phases={p: phase_report(p, workers, None) for p in PHASES},
            kv_bytes_moved=kv_bytes, kv_gb_per_s=ratio(kv_bytes / 1e9, busy), total_j=None, idle_j=None,
            output_tokens_per_joule=None, energy_source=None, energy_note="", workers=[worker_report(w, None) for w in workers])

    def close(self) -> None:
        """Stop the energy reader."""
