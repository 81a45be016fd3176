"""Splits the joules of an interval among what workers did in it. Pure arithmetic on time.

At each instant the interval's mean power goes in equal parts to the workers that are busy, and a worker's
part in equal parts to what it does at once (prefill and transfer overlap); with nobody busy it is idle.
"""

from collections.abc import Iterator, Sequence

from kvrelay.energy.records import Activity, Interval


def split_joules(interval: Interval, activities: Sequence[Activity]) -> tuple[list[float], float]:
    """Joules of each activity, in order, and the idle joules; together exactly the interval's."""
    shares = [0.0] * len(activities)
    power_w = interval.joules / (interval.end_s - interval.start_s)
    busy: dict[str, set[int]] = {}
    idle_j, cursor_s = 0.0, interval.start_s
    for at_s, starts, index in _edges(interval, activities):
        idle_j += _spread(shares, busy, power_w * (at_s - cursor_s))
        cursor_s = at_s
        _switch(busy, activities[index].worker_id, index, starts)
    return shares, idle_j + power_w * (interval.end_s - cursor_s)


def overlaps(
    intervals: Sequence[Interval], activities: Sequence[Activity]
) -> Iterator[tuple[Interval, list[Activity]]]:
    """Each interval with the activities that touch it; both must be sorted by start. Linear in both."""
    live: list[Activity] = []
    upcoming = 0
    for interval in intervals:
        while upcoming < len(activities) and activities[upcoming].start_s < interval.end_s:
            live.append(activities[upcoming])
            upcoming += 1
        live = [activity for activity in live if activity.end_s > interval.start_s]
        yield interval, live


def _edges(interval: Interval, activities: Sequence[Activity]) -> list[tuple[float, bool, int]]:
    edges = []
    for index, activity in enumerate(activities):
        start_s = max(activity.start_s, interval.start_s)
        end_s = min(activity.end_s, interval.end_s)
        if start_s < end_s:
            edges += [(start_s, True, index), (end_s, False, index)]
    return sorted(edges)


def _spread(shares: list[float], busy: dict[str, set[int]], joules: float) -> float:
    """Adds the joules of one stretch to whoever is busy in it; returns them when nobody is."""
    if not busy:
        return joules
    per_worker = joules / len(busy)
    for indices in busy.values():
        for index in indices:
            shares[index] += per_worker / len(indices)
    return 0.0


def _switch(busy: dict[str, set[int]], worker_id: str, index: int, starts: bool) -> None:
    if starts:
        busy.setdefault(worker_id, set()).add(index)
        return
    busy[worker_id].discard(index)
    if not busy[worker_id]:
        del busy[worker_id]
