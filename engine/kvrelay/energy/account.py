"""Who used the joules: attributes a meter's counters to phases, workers and requests.

Pure: time comes in as an argument, there is no clock, thread or device here. Holds one meter's figures;
measured and modelled joules never meet.
"""

import math
from collections.abc import Mapping, Sequence

from kvrelay.energy.domain_ledger import DomainLedger
from kvrelay.energy.records import Activity, Domain
from kvrelay.energy.report import MIN_UPDATES, EnergyReport, RequestEnergy, WorkerEnergy
from kvrelay.energy.tally import RequestTally, Tally
from kvrelay.errors import UnknownName
from kvrelay.types import PHASES

MAX_LAG_S = 600.0
MAX_REQUESTS = 16_384


class EnergyAccount:
    """Joules by phase, worker and request; prefill + transfer + decode + idle is what the meter counted.

    Activities may come in any order and late: time is settled when all workers of a domain have sent a
    heartbeat past it, or after `max_lag_s`. At most `max_requests` requests are remembered, those charged
    last. `source=None` (no meter) makes every figure None. Not thread-safe: see `EnergyReader`.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        source: str | None,
        *,
        max_lag_s: float = MAX_LAG_S,
        max_requests: int = MAX_REQUESTS,
    ) -> None:
        self._source = source
        self._ledgers = {domain.name: DomainLedger(domain) for domain in domains}
        self._max_lag_s = max_lag_s
        self._max_requests = max_requests
        self._settled = Tally()
        self._provisional: Tally | None = None
        self._worker_ids = {worker_id for domain in domains for worker_id in domain.worker_ids}
        self._cpu_s = dict.fromkeys(sorted(self._worker_ids), 0.0)
        self._missed_s: dict[str, float] = {}
        self._failure: str | None = None

    def add_sample(self, now_s: float, joules: Mapping[str, float]) -> None:
        """Cumulative joules per domain, as `Meter.sample` gives them."""
        for name, ledger in self._ledgers.items():
            for activity in ledger.add_sample(now_s, joules[name]):
                self._note_missed(activity)
        self._provisional = None
        self._settle(now_s)

    def add_activity(self, activity: Activity) -> None:
        """Notes what a worker did. Raises `UnknownName` for a worker that the meter does not know."""
        for ledger in self._ledgers_of(activity.worker_id):
            if ledger.add_activity(activity):
                self._note_missed(activity)
        if activity.worker_id in self._cpu_s:
            self._cpu_s[activity.worker_id] += activity.cpu_s
        self._provisional = None

    def add_heartbeat(self, worker_id: str, until_s: float) -> None:
        """The worker has reported every activity that starts before `until_s`. Raises `UnknownName`."""
        for ledger in self._ledgers_of(worker_id):
            ledger.report_until(worker_id, until_s)
        self._settle(-math.inf)

    def retire_worker(self, worker_id: str) -> None:
        """The worker has ended: nobody waits for its reports any longer. Raises `UnknownName`."""
        self.add_heartbeat(worker_id, math.inf)

    def fail(self, reason: str) -> None:
        """The meter can no longer be read: from here on totals are unknown, so all are None."""
        self._failure = self._failure or reason

    def request_energy(self, request_id: str, now_s: float) -> RequestEnergy:
        """Joules of one request so far; phases are None when nothing is known of them."""
        self._settle(now_s)
        final = self._settled.requests.get(request_id, RequestTally())
        added = self._pending_tally().requests.get(request_id, RequestTally())
        waits = any(request_id in a.num_tokens for ledger in self._ledgers.values() for a in ledger.waiting)
        num_updates = final.num_updates + added.num_updates
        if not num_updates or (waits and self._failure):
            return RequestEnergy(source=self._source)
        known = {**final.joules, **added.joules}.keys() - final.missed
        joules = {f"{p}_j": final.joules.get(p, 0.0) + added.joules.get(p, 0.0) for p in known}
        return RequestEnergy(
            **joules,
            source=self._source,
            settled=not waits,
            num_updates=num_updates,
            short_window=num_updates < MIN_UPDATES,
        )

    def snapshot(self, now_s: float) -> EnergyReport:
        """All that is known up to the last counter update, provisional where workers still owe reports."""
        self._settle(now_s)
        ledgers = self._ledgers.values()
        reason = self._why_unknown()
        known = self._totals() if reason is None else {}
        return EnergyReport(
            source=self._source,
            reason=reason,
            window_s=max((ledger.window_s for ledger in ledgers), default=0.0),
            provisional_s=max((ledger.pending_s for ledger in ledgers), default=0.0),
            num_updates=min((ledger.num_updates for ledger in ledgers), default=0),
            workers={worker_id: self._worker(worker_id, reason is None) for worker_id in self._cpu_s},
            warnings=self._late_warnings(),
            **known,
        )

    def _ledgers_of(self, worker_id: str) -> list[DomainLedger]:
        if self._ledgers and worker_id not in self._worker_ids:
            raise UnknownName(f"unknown worker {worker_id!r}; the meter knows {sorted(self._worker_ids)}")
        return [ledger for ledger in self._ledgers.values() if worker_id in ledger.domain.worker_ids]

    def _note_missed(self, activity: Activity) -> None:
        late_s = activity.end_s - activity.start_s
        self._missed_s[activity.worker_id] = self._missed_s.get(activity.worker_id, 0.0) + late_s
        for request_id in activity.num_tokens:
            self._settled.request(request_id).missed.add(activity.phase)

    def _settle(self, now_s: float) -> None:
        for ledger in self._ledgers.values():
            if ledger.settle(self._settled, now_s - self._max_lag_s):
                self._provisional = None
        requests = self._settled.requests
        while len(requests) > self._max_requests:
            del requests[next(iter(requests))]

    def _pending_tally(self) -> Tally:
        if self._provisional is None:
            self._provisional = Tally()
            for ledger in self._ledgers.values():
                ledger.charge_pending(self._provisional)
        return self._provisional

    def _why_unknown(self) -> str | None:
        if self._failure or self._source is None:
            return self._failure or "no energy meter"
        still = [name for name, ledger in self._ledgers.items() if not ledger.num_updates]
        return f"the counter of {', '.join(still)} has not moved yet" if still else None

    def _totals(self) -> dict[str, float | None]:
        both = (self._settled, self._pending_tally())
        totals: dict[str, float | None] = {f"{p}_j": sum(t.phase_j(p) for t in both) for p in PHASES}
        gross_j = sum(tally.gross_j for tally in both)
        idle_j = sum(sum(tally.idle_j.values()) for tally in both)
        totals |= {"idle_j": idle_j, "gross_j": gross_j, "net_j": gross_j - idle_j}
        return totals | {"unassigned_j": sum(tally.unassigned_j for tally in both)} | self._bounds()

    def _bounds(self) -> dict[str, float | None]:
        lower_j = upper_j = 0.0
        for ledger in self._ledgers.values():
            if ledger.domain.idle_w is None or ledger.domain.busy_w is None:
                return {"lower_j": None, "upper_j": None}
            lower_j += ledger.domain.idle_w * ledger.window_s
            upper_j += ledger.domain.busy_w * ledger.window_s
        return {"lower_j": lower_j, "upper_j": upper_j}

    def _worker(self, worker_id: str, known: bool) -> WorkerEnergy:
        if not known:
            return WorkerEnergy(cpu_s=self._cpu_s[worker_id])
        both = (self._settled, self._pending_tally())
        joules = {f"{p}_j": sum(t.worker_j.get((worker_id, p), 0.0) for t in both) for p in PHASES}
        own = [ledger.domain for ledger in self._ledgers_of(worker_id)]
        alone = all(domain.worker_ids == (worker_id,) for domain in own)
        idle_j = sum(tally.idle_j.get(domain.name, 0.0) for tally in both for domain in own)
        return WorkerEnergy(**joules, idle_j=idle_j if alone else None, cpu_s=self._cpu_s[worker_id])

    def _late_warnings(self) -> tuple[str, ...]:
        return tuple(
            f"worker {worker_id!r}: steps of {late_s:.3g} s fell outside the time that was still open; "
            "their joules count as idle or as other work"
            for worker_id, late_s in self._missed_s.items()
        )
