"""The account by example: who is charged for which joules, when it is final, what is said when unknown."""

import pytest

from kvrelay.energy.account import EnergyAccount
from kvrelay.energy.records import Activity, Domain
from kvrelay.errors import ProtocolError, UnknownName
from kvrelay.types import Phase

SHARED = Domain(name="package", worker_ids=("p", "d"))
SOURCE = "rapl"


def act(
    worker: str, phase: Phase, start_s: float, end_s: float, *, cpu_s: float = 0.0, **tokens: int
) -> Activity:
    return Activity(
        worker_id=worker, phase=phase, start_s=start_s, end_s=end_s, num_tokens=tokens, cpu_s=cpu_s
    )


def measured(
    *domains: Domain, watts: float = 10.0, end_s: float = 10.0, step_s: float = 0.5
) -> EnergyAccount:
    """An account that has seen `watts` on every domain from 0 to `end_s`."""
    account = EnergyAccount(domains or (SHARED,), SOURCE)
    for index in range(round(end_s / step_s) + 1):
        now_s = index * step_s
        account.add_sample(now_s, {domain.name: watts * now_s for domain in domains or (SHARED,)})
    return account


def test_busy_time_is_charged_to_its_phase_and_the_rest_is_idle() -> None:
    account = measured()
    account.add_activity(act("p", "prefill", 1.0, 3.2, a=5))
    account.add_activity(act("d", "decode", 4.0, 5.0, a=1))
    report = account.snapshot(10.0)
    assert (report.prefill_j, report.transfer_j, report.decode_j) == (
        pytest.approx(22),
        0.0,
        pytest.approx(10),
    )
    assert (report.gross_j, report.idle_j, report.net_j) == (100.0, pytest.approx(68), pytest.approx(32))
    assert report.phase_j("prefill") == report.prefill_j
    assert report.workers["p"].prefill_j == pytest.approx(22)
    assert report.workers["d"].decode_j == pytest.approx(10)
    assert report.workers["p"].idle_j is None
    assert report.source == SOURCE
    assert report.lower_j is None


def test_workers_busy_at_once_share_the_domain_and_each_shares_among_its_own() -> None:
    account = measured()
    account.add_activity(act("p", "prefill", 0.0, 4.0))
    account.add_activity(act("p", "transfer", 2.0, 3.0))
    account.add_activity(act("d", "decode", 2.0, 6.0))
    report = account.snapshot(10.0)
    assert report.prefill_j == pytest.approx(20 + 2.5 + 5)
    assert report.transfer_j == pytest.approx(2.5)
    assert report.decode_j == pytest.approx(5 + 5 + 20)
    assert report.unassigned_j == pytest.approx(60)


def test_a_step_is_shared_by_its_tokens() -> None:
    account = measured()
    account.add_activity(act("p", "prefill", 0.0, 1.0, a=30, b=10))
    account.add_activity(act("d", "decode", 2.0, 3.0, a=1, b=1))
    a, b = (account.request_energy(name, 10.0) for name in "ab")
    assert (a.prefill_j, b.prefill_j) == (pytest.approx(7.5), pytest.approx(2.5))
    assert (a.decode_j, b.decode_j) == (pytest.approx(5.0), pytest.approx(5.0))
    assert a.transfer_j is None
    assert a.total_j == pytest.approx(12.5)
    assert a.source == SOURCE


def test_two_domains_of_one_worker_add_up_and_stay_apart_from_another_workers() -> None:
    domains = (Domain(name="cpu", worker_ids=("p",)), Domain(name="dram", worker_ids=("p",)))
    account = measured(*domains, Domain(name="other", worker_ids=("d",)))
    account.add_activity(act("p", "prefill", 0.0, 1.0, a=1))
    report = account.snapshot(10.0)
    assert report.prefill_j == pytest.approx(20)
    assert report.workers["p"].idle_j == pytest.approx(180)
    assert report.workers["d"].idle_j == pytest.approx(100)
    assert account.request_energy("a", 10.0).prefill_j == pytest.approx(20)


def test_late_activities_move_joules_from_idle_until_heartbeats_settle_them() -> None:
    account = measured()
    assert account.snapshot(10.0).idle_j == pytest.approx(100)
    account.add_heartbeat("p", 10.0)
    assert account.snapshot(10.0).provisional_s == pytest.approx(10)
    account.add_activity(act("d", "decode", 1.0, 2.0, a=1))
    assert account.snapshot(10.0).decode_j == pytest.approx(10)
    assert not account.request_energy("a", 10.0).settled
    account.add_heartbeat("d", 1.7)
    assert not account.request_energy("a", 10.0).settled
    account.add_heartbeat("d", 10.0)
    report = account.snapshot(10.0)
    assert (report.provisional_s, report.decode_j) == (0.0, pytest.approx(10))
    assert account.request_energy("a", 10.0).settled


def test_an_activity_after_its_own_heartbeat_is_told_and_its_request_unknown() -> None:
    account = measured()
    account.add_activity(act("d", "decode", 1.0, 2.0, a=1))
    account.add_heartbeat("p", 5.0)
    account.add_heartbeat("d", 5.0)
    account.add_activity(act("p", "prefill", 2.0, 6.0, a=1))
    report = account.snapshot(10.0)
    assert report.prefill_j == pytest.approx(10)
    assert report.gross_j == 100.0
    assert "worker 'p'" in report.warnings[0]
    energy = account.request_energy("a", 10.0)
    assert energy.prefill_j is None
    assert energy.decode_j == pytest.approx(10)


def test_activity_before_the_first_sample_is_told_and_not_charged() -> None:
    account = EnergyAccount([SHARED], SOURCE)
    account.add_activity(act("p", "prefill", -2.0, -1.0, a=1))
    account.add_activity(act("d", "decode", -1.0, 1.0, b=1))
    for now_s in (0.0, 1.0, 2.0):
        account.add_sample(now_s, {"package": 10 * now_s})
    assert account.snapshot(2.0).decode_j == pytest.approx(10)
    assert account.request_energy("a", 2.0).prefill_j is None
    assert account.request_energy("b", 2.0).decode_j is None
    assert len(account.snapshot(2.0).warnings) == 2


def test_a_silent_worker_holds_nothing_back_past_the_longest_lag_or_its_retirement() -> None:
    account = EnergyAccount([SHARED], SOURCE, max_lag_s=4.0)
    for now_s in range(11):
        account.add_sample(now_s, {"package": 10.0 * now_s})
    assert account.snapshot(10.0).provisional_s == pytest.approx(4.0)
    account.add_heartbeat("p", 10.0)
    account.retire_worker("d")
    assert account.snapshot(10.0).provisional_s == 0.0


def test_memory_is_bounded_whatever_is_never_reported_or_forgotten() -> None:
    account = EnergyAccount([SHARED], SOURCE, max_lag_s=5.0, max_requests=8)
    for index in range(2000):
        now_s = index * 0.1
        account.add_sample(now_s, {"package": 3.0 * now_s})
        account.add_activity(act("d", "decode", now_s - 0.1, now_s, **{f"r{index}": 1}))
    ledger = account._ledgers["package"]
    assert len(ledger.pending) <= 52
    assert len(ledger.waiting) <= 52
    assert len(account._settled.requests) <= 8
    assert account.request_energy("r0", 200.0).decode_j is None
    assert account.request_energy("r1990", 200.0).decode_j == pytest.approx(0.3)
    assert account.snapshot(200.0).decode_j == pytest.approx(account.snapshot(200.0).gross_j, rel=1e-3)


def test_the_requests_charged_last_are_those_remembered() -> None:
    account = EnergyAccount([Domain(name="own", worker_ids=("d",))], SOURCE, max_requests=2)
    for now_s in range(10):
        account.add_sample(now_s, {"own": 10.0 * now_s})
    for start_s, name in enumerate(["long", "b", "long", "c", "long", "d"]):
        account.add_activity(act("d", "decode", start_s, start_s + 1.0, **{name: 1}))
        account.add_heartbeat("d", start_s + 1.0)
    assert account.request_energy("long", 9.0).decode_j == pytest.approx(30)
    assert account.request_energy("b", 9.0).decode_j is None


def test_without_a_meter_everything_is_none() -> None:
    account = EnergyAccount([], None)
    account.add_activity(act("p", "prefill", 0.0, 1.0, a=1))
    account.add_heartbeat("p", 1.0)
    account.add_sample(1.0, {})
    report = account.snapshot(2.0)
    joules = (
        report.gross_j,
        report.idle_j,
        report.net_j,
        report.prefill_j,
        report.transfer_j,
        report.decode_j,
    )
    assert joules == (None,) * 6
    assert (report.source, report.reason) == (None, "no energy meter")
    assert not report.short_window
    assert account.request_energy("a", 2.0).total_j is None


def test_a_counter_that_has_not_moved_is_unknown_not_zero() -> None:
    account = EnergyAccount([SHARED], SOURCE)
    account.add_activity(act("p", "prefill", 0.0, 5.0, a=1))
    for index in range(100):
        account.add_sample(index * 0.05, {"package": 0.0})
    report = account.snapshot(5.0)
    assert report.gross_j is None
    assert report.workers["p"].prefill_j is None
    assert "package has not moved" in (report.reason or "")


def test_a_request_newer_than_the_last_update_is_unknown_not_zero() -> None:
    account = measured()
    account.add_activity(act("d", "decode", 10.1, 10.2, a=1))
    energy = account.request_energy("a", 10.2)
    assert (energy.decode_j, energy.settled, energy.source) == (None, False, SOURCE)
    assert account.request_energy("nobody", 10.2).total_j is None


def test_a_failed_meter_makes_totals_unknown_and_keeps_settled_requests() -> None:
    account = measured()
    account.add_activity(act("d", "decode", 1.0, 2.0, a=1))
    account.add_activity(act("d", "decode", 9.0, 12.0, b=1))
    for worker in ("p", "d"):
        account.add_heartbeat(worker, 9.0)
    account.fail("GPU is lost")
    account.fail("later")
    report = account.snapshot(12.0)
    assert (report.gross_j, report.reason, report.source) == (None, "GPU is lost", SOURCE)
    assert account.request_energy("a", 12.0).decode_j == pytest.approx(10)
    assert account.request_energy("b", 12.0).decode_j is None


@pytest.mark.parametrize(("num_updates", "short"), [(19, True), (20, False)])
def test_windows_of_fewer_than_20_updates_are_flagged(num_updates: int, short: bool) -> None:
    account = measured(end_s=num_updates * 0.5)
    report = account.snapshot(100.0)
    assert report.num_updates == num_updates
    assert report.short_window is short
    assert (report.short_window_reason is not None) is short
    assert report.to_dict()["short_window"] is short


def test_a_short_request_is_flagged_and_a_long_one_is_not() -> None:
    account = measured(end_s=20.0)
    account.add_activity(act("d", "decode", 0.0, 3.0, a=1))
    account.add_activity(act("d", "decode", 4.0, 14.0, b=1))
    assert account.request_energy("a", 20.0).short_window
    assert not account.request_energy("b", 20.0).short_window


def test_samples_between_updates_close_no_interval() -> None:
    account = EnergyAccount([SHARED], SOURCE)
    for now_s, joules in [(0.0, 0.0), (0.05, 0.0), (0.1, 10.0), (0.15, 10.0), (0.2, 20.0)]:
        account.add_sample(now_s, {"package": joules})
    account.add_activity(act("d", "decode", 0.05, 0.1, a=1))
    report = account.snapshot(0.2)
    assert report.num_updates == 2
    assert report.decode_j == pytest.approx(5.0)


def test_unknown_workers_and_senseless_activities_are_refused() -> None:
    account = measured()
    with pytest.raises(UnknownName, match=r"'x'.*\['d', 'p'\]"):
        account.add_activity(act("x", "decode", 0.0, 1.0))
    with pytest.raises(UnknownName):
        account.add_heartbeat("x", 1.0)
    for field, broken in [
        ("phase", lambda: act("p", "sleep", 0.0, 1.0)),  # type: ignore[arg-type]
        ("start_s", lambda: act("p", "decode", 2.0, 1.0)),
        ("start_s", lambda: act("p", "decode", float("nan"), 1.0)),
        ("cpu_s", lambda: act("p", "decode", 0.0, 1.0, cpu_s=-1.0)),
        ("num_tokens", lambda: act("p", "decode", 0.0, 1.0, a=-1)),
    ]:
        with pytest.raises(ProtocolError, match=field):
            broken()


def test_each_answer_includes_what_came_since_the_last() -> None:
    account = measured()
    assert account.snapshot(10.0).gross_j == 100.0
    account.add_sample(11.0, {"package": 130.0})
    assert account.snapshot(11.0).gross_j == 130.0
    account.add_activity(act("d", "decode", 10.0, 11.0, a=1))
    assert account.snapshot(11.0).decode_j == pytest.approx(30)
