"""Conservation and order independence of the account, over random lives of workers."""

import math
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.energy.account import EnergyAccount
from kvrelay.energy.records import Activity, Domain
from kvrelay.energy.report import EnergyReport
from kvrelay.types import PHASES

WORKERS = ("p0", "p1", "d0")
DOMAINS = (
    Domain(name="shared", worker_ids=("p0", "p1", "d0")),
    Domain(name="own", worker_ids=("d0",)),
    Domain(name="two", worker_ids=("p0", "p1"), min_update_s=0.1),
)
NAMES = ("a", "b", "c")
SPAN_S = 4.0


@dataclass(frozen=True)
class Life:
    """Samples and activities of a run, and a seed for the order in which they arrive."""

    samples: tuple[tuple[float, dict[str, float]], ...]
    activities: tuple[Activity, ...]
    seed: int


@st.composite
def activities(draw: st.DrawFn) -> Activity:
    start_s = draw(st.floats(0.0, SPAN_S))
    return Activity(
        worker_id=draw(st.sampled_from(WORKERS)),
        phase=draw(st.sampled_from(PHASES)),
        start_s=start_s,
        end_s=start_s + draw(st.floats(0.0, 1.5)),
        num_tokens=draw(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 50), min_size=1)),
    )


@st.composite
def lives(draw: st.DrawFn) -> Life:
    cumulative = dict.fromkeys((domain.name for domain in DOMAINS), 0.0)
    samples, now_s = [(0.0, dict(cumulative))], 0.0
    for _ in range(draw(st.integers(1, 12))):
        now_s += draw(st.floats(1e-3, 0.7))
        for name in cumulative:
            cumulative[name] += draw(st.one_of(st.just(0.0), st.floats(1e-3, 500.0)))
        samples.append((now_s, dict(cumulative)))
    final = {name: joules + 1.0 for name, joules in cumulative.items()}
    samples += [(now_s + 1.0, final)]
    return Life(tuple(samples), tuple(draw(st.lists(activities(), max_size=12))), draw(st.integers(0, 2**32)))


def in_order(life: Life) -> EnergyAccount:
    """Every sample first, then every activity; nothing settles before the end."""
    account = EnergyAccount(DOMAINS, "rapl")
    for now_s, joules in life.samples:
        account.add_sample(now_s, joules)
    for activity in life.activities:
        account.add_activity(activity)
    return account


def shuffled(life: Life) -> EnergyAccount:
    """Activities at any moment and in any order, honest heartbeats and questions in between."""
    random, account = Random(life.seed), EnergyAccount(DOMAINS, "rapl")
    owed = list(life.activities)
    random.shuffle(owed)
    for now_s, joules in life.samples:
        account.add_sample(now_s, joules)
        for _ in range(random.randint(0, 2)):
            if owed:
                account.add_activity(owed.pop())
        for worker_id in random.sample(WORKERS, 2):
            starts = [a.start_s for a in owed if a.worker_id == worker_id]
            account.add_heartbeat(worker_id, min(starts, default=math.inf))
        account.snapshot(now_s)
        account.request_energy("a", now_s)
    for activity in owed:
        account.add_activity(activity)
    return account


def check_conserved(account: EnergyAccount, life: Life, report: EnergyReport) -> None:
    total_j = sum(life.samples[-1][1].values())
    parts = (report.prefill_j, report.transfer_j, report.decode_j, report.idle_j)
    assert math.fsum(part or 0.0 for part in parts) == pytest.approx(total_j, rel=1e-9)
    assert report.gross_j == pytest.approx(total_j, rel=1e-9)
    assert all(part is not None and part >= 0.0 for part in parts)
    for phase in PHASES:
        named = (getattr(account.request_energy(name, 99.0), f"{phase}_j") for name in NAMES)
        per_worker = (getattr(worker, f"{phase}_j") for worker in report.workers.values())
        assert math.fsum(j or 0.0 for j in named) == pytest.approx(report.phase_j(phase), rel=1e-9, abs=1e-9)
        assert math.fsum(per_worker) == pytest.approx(report.phase_j(phase), rel=1e-9, abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(lives())
def test_phases_and_idle_are_the_total_before_and_after_settling(life: Life) -> None:
    for account in (in_order(life), shuffled(life)):
        provisional = account.snapshot(99.0)
        check_conserved(account, life, provisional)
        for worker_id in WORKERS:
            account.retire_worker(worker_id)
        final = account.snapshot(99.0)
        check_conserved(account, life, final)
        assert final.provisional_s == 0.0
        assert final.warnings == ()


@settings(max_examples=150, deadline=None)
@given(lives())
def test_the_order_of_arrival_changes_nothing(life: Life) -> None:
    first, second = in_order(life), shuffled(life)
    for account in (first, second):
        for worker_id in WORKERS:
            account.retire_worker(worker_id)
    a, b = first.snapshot(99.0), second.snapshot(99.0)
    for name in ("prefill_j", "transfer_j", "decode_j", "idle_j", "gross_j"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9, abs=1e-9)
    for name in NAMES:
        x, y = first.request_energy(name, 99.0), second.request_energy(name, 99.0)
        assert x.total_j == (None if y.total_j is None else pytest.approx(y.total_j, rel=1e-9, abs=1e-9))
        assert x.num_updates == y.num_updates
