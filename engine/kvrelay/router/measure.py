"""The run's books: engine steps and energy in, one report out."""

import time
from collections.abc import Mapping, Sequence

from kvrelay.config import EngineConfig, cuda_visible_devices
from kvrelay.energy import Activity, EnergyReader, EnergyReport, RequestEnergy, WorkerSite, open_meter
from kvrelay.energy.power_model import parse_power_model
from kvrelay.energy.report import WorkerEnergy
from kvrelay.errors import InvalidConfig
from kvrelay.metrics import Report, WorkerTotals, hidden_share, phase_report, ratio, worker_report
from kvrelay.router.core import Router
from kvrelay.types import PHASES, Phase, RequestId, WorkerId
from kvrelay.wire import Heartbeat, Hello, StepReport

WATTS_EVERY_S = 1.0
SAMPLE_EVERY_S = 0.02  # a request that ends samples the meter, at most this often


class Measurement:
    """Counts what the router's requests cost. Used on the router's thread only, but for `close`."""

    def __init__(self, config: EngineConfig, router: Router) -> None:
        self._config, self._router = config, router
        powers = config.powers()
        self._power_model = None if powers is None else parse_power_model(powers)
        self._reader: EnergyReader | None = None
        self._sampled_s = self._watts_s = self._opened_s = 0.0

    def open(self, hellos: Sequence[Hello]) -> None:
        """The workers are known: start the energy reader. Raises what `open_meter` raises."""
        sites = [
            WorkerSite(
                worker_id=hello.worker_id,
                pid=hello.pid,
                device=hello.device,
                role=hello.role,
                num_threads=hello.num_threads,
                visible_devices=cuda_visible_devices(),
            )
            for hello in hellos
        ]
        meter = open_meter(self._config.meter, sites, self._power_model)
        if meter.source is None and self._config.policy == "energy_aware":
            meter.close()
            raise InvalidConfig(f"policy='energy_aware' needs joules, and there is no meter: {meter.why}")
        self._reader, self._opened_s = EnergyReader(meter).start(), time.monotonic()

    def on_step(self, step: StepReport) -> None:
        """A worker did something; energy is shared by tokens, that of a transfer by bytes.

        What began before the books were opened, and is only now reported, is not counted.
        """
        if self._reader is not None and step.start_s >= self._opened_s:
            activity = Activity(
                worker_id=step.worker_id,
                phase=step.phase,
                start_s=step.start_s,
                end_s=step.end_s,
                num_tokens=step.moved_bytes if step.phase == "transfer" else step.num_tokens,
                cpu_s=step.cpu_s,
            )
            self._reader.add_activity(activity)

    def on_heartbeat(self, beat: Heartbeat) -> None:
        """A worker has reported all it did up to then."""
        if self._reader is not None:
            self._reader.add_heartbeat(beat.worker_id, beat.at_s)

    def on_worker_dead(self, worker_id: WorkerId) -> None:
        """Nothing more will be reported by this worker."""
        if self._reader is not None:
            self._reader.retire_worker(worker_id)

    def request_energy(self, request_id: RequestId) -> RequestEnergy:
        """What the request has cost so far, as far as the meter has seen."""
        if self._reader is None:
            return RequestEnergy()
        now_s = time.monotonic()
        if now_s - self._sampled_s > SAMPLE_EVERY_S:
            self._sampled_s = now_s
            self._reader.sample_now()
        return self._reader.request_energy(request_id)

    def update_watts(self, now_s: float) -> None:
        """Tell the fleet what each worker draws at work in each phase, for policies that look at energy."""
        if self._reader is None or self._reader.meter.source is None or now_s < self._watts_s + WATTS_EVERY_S:
            return
        self._watts_s = now_s
        account = self._reader.snapshot()
        for worker_id, energy in account.workers.items():
            totals = self._router.workers[WorkerId(worker_id)]
            watts = net_watts(energy, totals.busy_s, account.window_s)
            self._router.fleet.loads[WorkerId(worker_id)].watts = watts

    def report(self, now_s: float) -> Report:
        """Everything so far; the window of an unfinished run ends at `now_s`."""
        router = self._router
        workers = list(router.workers.values())
        energy = self.energy()
        counts = router.counts
        window_s = counts.window_s(now_s, is_running=bool(router.requests))
        transfer_s = sum(worker.busy_s["transfer"] for worker in workers)
        kv_bytes = sum(worker.kv_bytes for worker in workers)
        return Report(
            window_s=window_s,
            num_requests={**counts.num_ended, "running": len(router.requests)},
            num_prompt_tokens=counts.num_prompt_tokens,
            num_output_tokens=counts.num_output_tokens,
            output_tokens_per_s=ratio(counts.num_output_tokens, window_s),
            phases={phase: phase_report(phase, workers, energy.phase_j(phase)) for phase in PHASES},
            kv_bytes_moved=kv_bytes,
            kv_gb_per_s=ratio(kv_bytes / 1e9, transfer_s) if kv_bytes else None,
            transfer_overlap=hidden_share(counts.transfer_s, counts.transfer_wait_s),
            transfer_share_of_ttft=ratio(counts.transfer_wait_s, counts.ttft_s),
            total_j=energy.gross_j,
            idle_j=energy.idle_j,
            output_tokens_per_joule=ratio(counts.num_output_tokens, energy.gross_j),
            energy_source=energy.source,
            energy_note=self._energy_note(energy),
            energy=energy.to_dict(),
            workers=[
                worker_report(worker, _joules(energy, worker), router.fleet.loads[worker_id].role)
                for worker_id, worker in router.workers.items()
            ],
        )

    def close(self) -> None:
        """Stop the energy reader."""
        if self._reader is not None:
            self._reader.close()

    def energy(self) -> EnergyReport:
        """The meter's account up to now."""
        if self._reader is None:
            return EnergyReport(source=None, reason="the workers have not started")
        self._reader.sample_now()
        return self._reader.snapshot()

    def _energy_note(self, energy: EnergyReport) -> str:
        why = self._reader.meter.why if self._reader is not None else ""
        notes = [
            energy.reason,
            why,
            energy.short_window_reason and f"short window: {energy.short_window_reason}",
        ]
        return "; ".join(dict.fromkeys(note for note in (*notes, *energy.warnings) if note))


def _joules(energy: EnergyReport, worker: WorkerTotals) -> float | None:
    """All that the worker is charged with: its phases, and its idle time where that is its own."""
    found = energy.workers.get(worker.hello.worker_id)
    if found is None:
        return None
    parts = (found.prefill_j, found.transfer_j, found.decode_j, found.idle_j)
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def net_watts(energy: WorkerEnergy, busy_s: Mapping[Phase, float], window_s: float) -> dict[Phase, float]:
    """Joules of a phase over its seconds, less the worker's own idle draw where its meter tells it."""
    idle_s = window_s - busy_s["prefill"] - busy_s["decode"]  # transfer runs beside prefill
    idle_w = energy.idle_j / idle_s if energy.idle_j is not None and idle_s > 0.0 else 0.0
    joules: dict[Phase, float | None] = {"prefill": energy.prefill_j, "decode": energy.decode_j}
    known = {phase: j / busy_s[phase] for phase, j in joules.items() if j and busy_s[phase]}
    return {phase: max(0.0, watts - idle_w) for phase, watts in known.items()}
