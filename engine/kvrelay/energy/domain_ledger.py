"""One domain's counter over time: intervals between updates, and the activities that wait to be charged.

An interval is settled (charged for good) once every worker of the domain has reported past it; until then
it is pending and only provisional answers include it. Knows nothing of other domains.
"""

import math
from bisect import insort
from collections import deque
from operator import attrgetter

from kvrelay.energy.records import Activity, Domain, Interval
from kvrelay.energy.split import overlaps
from kvrelay.energy.tally import Tally

MAX_OPEN_S = 1.0  # a counter that stands still this long has counted zero, so that pending work is bounded


class DomainLedger:
    """Intervals and activities of one domain, in order of time; all times in monotonic seconds."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.num_updates = 0
        self.pending: deque[Interval] = deque()
        self.waiting: list[Activity] = []
        self._start_s: float | None = None
        self._settled_s = -math.inf
        self._edge_s = 0.0
        self._edge_j = 0.0
        self._reported_s = dict.fromkeys(domain.worker_ids, -math.inf)

    @property
    def window_s(self) -> float:
        """Time from the first sample to the last counter update."""
        return 0.0 if self._start_s is None else self._edge_s - self._start_s

    @property
    def pending_s(self) -> float:
        """The part of the window that is not settled."""
        return self._edge_s - self.pending[0].start_s if self.pending else 0.0

    def add_sample(self, now_s: float, joules: float) -> list[Activity]:
        """Notes the counter; returns activities of which a part came before the first sample.

        An interval ends where the counter is seen to have changed, not at every sample: a counter that
        steps every 100 ms says nothing of shorter times.
        """
        if self._start_s is None:
            return self._start(now_s, joules)
        age_s = now_s - self._edge_s
        assert joules >= self._edge_j or age_s <= 0, f"meter: {self.domain.name} fell"
        moved = joules > self._edge_j and age_s >= self.domain.min_update_s
        if age_s > 0 and (moved or age_s >= MAX_OPEN_S):
            self.pending.append(Interval(self._edge_s, now_s, joules - self._edge_j))
            self.num_updates += joules > self._edge_j
            self._edge_s, self._edge_j = now_s, joules
        return []

    def add_activity(self, activity: Activity) -> bool:
        """Keeps what can still be charged; returns whether a part of the activity came too late."""
        if activity.end_s > self._settled_s:
            insort(self.waiting, activity, key=attrgetter("start_s"))
        return activity.start_s < self._settled_s

    def report_until(self, worker_id: str, until_s: float) -> None:
        """Every activity of the worker that starts before `until_s` has been added; `inf`: none will come."""
        self._reported_s[worker_id] = max(self._reported_s[worker_id], until_s)

    def settle(self, tally: Tally, no_later_than_s: float) -> bool:
        """Charges the intervals that all workers have reported past, or that end before the given time.

        Returns whether there were any.
        """
        horizon_s = max(min(self._reported_s.values(), default=math.inf), no_later_than_s)
        ready: list[Interval] = []
        while self.pending and self.pending[0].end_s <= horizon_s:
            ready.append(self.pending.popleft())
        if not ready:
            return False
        for interval, activities in overlaps(ready, self.waiting):
            tally.charge(self.domain.name, interval, activities)
        self._settled_s = ready[-1].end_s
        self.waiting = [activity for activity in self.waiting if activity.end_s > self._settled_s]
        return True

    def charge_pending(self, tally: Tally) -> None:
        """Charges what is pending with what is known now, for a provisional answer."""
        for interval, activities in overlaps(self.pending, self.waiting):
            tally.charge(self.domain.name, interval, activities)

    def _start(self, now_s: float, joules: float) -> list[Activity]:
        self._start_s = self._settled_s = self._edge_s = now_s
        self._edge_j = joules
        early = [activity for activity in self.waiting if activity.start_s < now_s]
        self.waiting = [activity for activity in self.waiting if activity.end_s > now_s]
        return early
