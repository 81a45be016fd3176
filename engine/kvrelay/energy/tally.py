"""Running sums of joules by domain, worker, phase and request. Knows nothing of time or of settling."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrelay.energy.records import Activity, Interval
from kvrelay.energy.split import split_joules
from kvrelay.types import Phase


@dataclass(slots=True)
class RequestTally:
    """Joules of one request by phase, over `num_updates` counter updates.

    `missed` are phases of which a part was reported too late to be charged: their sums are too low.
    """

    joules: dict[Phase, float] = field(default_factory=dict)
    missed: set[Phase] = field(default_factory=set)
    num_updates: int = 0


@dataclass(slots=True)
class Tally:
    """Sums over the intervals charged so far; `requests` holds the one charged last at its end."""

    gross_j: float = 0.0
    unassigned_j: float = 0.0
    idle_j: dict[str, float] = field(default_factory=dict)
    worker_j: dict[tuple[str, Phase], float] = field(default_factory=dict)
    requests: dict[str, RequestTally] = field(default_factory=dict)

    def charge(self, domain: str, interval: Interval, activities: Sequence[Activity]) -> None:
        """Splits one interval of one domain among the activities and the idle time."""
        shares, idle_j = split_joules(interval, activities)
        self.gross_j += interval.joules
        self.idle_j[domain] = self.idle_j.get(domain, 0.0) + idle_j
        for request_id in self._charge_activities(activities, shares):
            self.requests[request_id].num_updates += 1

    def request(self, request_id: str) -> RequestTally:
        """The request's sums, made when absent, moved to the end."""
        found = self.requests.pop(request_id, None) or RequestTally()
        self.requests[request_id] = found
        return found

    def phase_j(self, phase: Phase) -> float:
        """Joules of one phase over all workers."""
        return sum((joules for (_, of_phase), joules in self.worker_j.items() if of_phase == phase), 0.0)

    def _charge_activities(self, activities: Sequence[Activity], shares: Sequence[float]) -> set[str]:
        charged: set[str] = set()
        for activity, joules in zip(activities, shares, strict=True):
            key = (activity.worker_id, activity.phase)
            self.worker_j[key] = self.worker_j.get(key, 0.0) + joules
            weight = sum(activity.num_tokens.values())
            if not weight:
                self.unassigned_j += joules
                continue
            for request_id, count in activity.num_tokens.items():
                sums = self.request(request_id).joules
                sums[activity.phase] = sums.get(activity.phase, 0.0) + joules * count / weight
                charged.add(request_id)
        return charged
