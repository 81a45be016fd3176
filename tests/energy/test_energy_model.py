"""Declared watts: their grammar, and the joules they make of CPU time."""

import os
import time

import pytest

from kvrelay.energy.account import EnergyAccount
from kvrelay.energy.model import ModelMeter, process_cpu_seconds
from kvrelay.energy.power_model import PowerModel, Watts, parse_power_model
from kvrelay.energy.records import WorkerSite
from kvrelay.errors import InvalidConfig
from kvrelay.types import Role


def site(worker_id: str, role: Role = "colocated", device: str = "cpu", num_threads: int = 1) -> WorkerSite:
    return WorkerSite(
        worker_id=worker_id, pid=hash(worker_id), device=device, role=role, num_threads=num_threads
    )


class Cpu:
    """CPU seconds of processes, set by the test; None once gone."""

    def __init__(self) -> None:
        self.seconds: dict[int, float | None] = {}

    def __call__(self, pid: int) -> float | None:
        return self.seconds.get(pid, 0.0)


def test_one_clause_is_for_every_worker_and_is_the_label() -> None:
    model = parse_power_model("idle_w=5,busy_w=20")
    assert model.label == "model(idle_w=5,busy_w=20)"
    assert model.watts_of(site("any")) == Watts(idle_w=5.0, busy_w=20.0)


def test_table_prefers_the_most_specific_key() -> None:
    text = (
        "idle_w=1,busy_w=1; cpu:idle_w=2,busy_w=2; decode:busy_w=3,idle_w=3;"
        "cuda:1:idle_w=4,busy_w=4; d7 : idle_w=5, busy_w=5.5"
    )
    model = parse_power_model(text)
    assert model.watts_of(site("x", "prefill", "mps")).idle_w == 1
    assert model.watts_of(site("x", "prefill", "cpu")).idle_w == 2
    assert model.watts_of(site("x", "decode", "cpu")).idle_w == 3
    assert model.watts_of(site("x", "decode", "cuda:1")).idle_w == 4
    assert model.watts_of(site("d7", "decode", "cuda:1")).busy_w == 5.5
    assert parse_power_model(model.label.removeprefix("model(").removesuffix(")")) == model


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' in '': expected"),
        ("idle_w=5", "busy_w is missing"),
        ("busy_w=5", "idle_w is missing"),
        ("idle_w=5,busy_w=x", "busy_w='x': expected a number"),
        ("idle_w=5,busy_w=", "busy_w=''"),
        ("idle_w=5,busy_w=4", "busy_w=4: expected finite watts >= idle_w=5"),
        ("idle_w=-1,busy_w=4", "idle_w=-1"),
        ("idle_w=nan,busy_w=4", "idle_w=nan"),
        ("idle_w=1,busy_w=inf", "busy_w=inf"),
        ("idle_w=1,idle_w=1,busy_w=2", "idle_w is given twice"),
        ("idle_w=1,busy_w=2,peak_w=3", "'peak_w=3'"),
        ("idle_w=1,busy_w=2;idle_w=1,busy_w=2", "the default is declared twice"),
        ("a:idle_w=1,busy_w=2;a:idle_w=1,busy_w=2", "a is declared twice"),
    ],
)
def test_bad_watts_name_the_field(text: str, reason: str) -> None:
    with pytest.raises(InvalidConfig, match=reason):
        parse_power_model(text)


def test_keys_that_fit_no_worker_and_workers_without_watts_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="no worker answers to \\['prefil'\\]"):
        ModelMeter([site("a", "prefill")], parse_power_model("prefil:idle_w=1,busy_w=2"), Cpu())
    model = parse_power_model("prefill:idle_w=1,busy_w=2")
    with pytest.raises(InvalidConfig, match="nothing declared for worker 'b'"):
        ModelMeter([site("a", "prefill"), site("b", "decode")], model, Cpu())


def test_joules_are_idle_plus_utilisation_times_the_rest() -> None:
    cpu, workers = Cpu(), [site("a", num_threads=2), site("b")]
    meter = ModelMeter(workers, parse_power_model("idle_w=5,busy_w=20"), cpu)
    meter.sample(100.0)
    cpu.seconds = {workers[0].pid: 4.0, workers[1].pid: 5.0}
    joules = meter.sample(110.0)
    assert joules["a"] == pytest.approx(5 * 10 + 15 * 10 * 4 / 20)
    assert joules["b"] == pytest.approx(5 * 10 + 15 * 10 * 5 / 10)
    assert meter.source == "model(idle_w=5,busy_w=20)"


def test_cpu_ticks_larger_than_the_interval_are_carried_over() -> None:
    cpu, worker = Cpu(), site("a")
    meter = ModelMeter([worker], parse_power_model("idle_w=0,busy_w=10"), cpu)
    for index in range(401):
        now_s = index * 0.005
        cpu.seconds[worker.pid] = round(now_s + 1e-9, 2)
        joules = meter.sample(now_s)["a"]
    assert joules == pytest.approx(20.0, abs=0.2)


def test_joules_stay_within_the_bounds_that_the_report_gives() -> None:
    cpu, worker = Cpu(), site("a")
    meter = ModelMeter([worker], parse_power_model("idle_w=3,busy_w=9"), cpu)
    account = EnergyAccount(meter.domains, meter.source)
    for index in range(50):
        cpu.seconds[worker.pid] = index * 0.3
        account.add_sample(index * 0.1, meter.sample(index * 0.1))
    report = account.snapshot(5.0)
    assert report.lower_j == pytest.approx(3 * 4.9)
    assert report.upper_j == pytest.approx(9 * 4.9)
    assert report.gross_j == pytest.approx(report.upper_j)


def test_a_process_that_has_gone_draws_nothing_and_is_named() -> None:
    cpu, worker = Cpu(), site("a")
    meter = ModelMeter([worker], parse_power_model("idle_w=3,busy_w=9"), cpu)
    meter.sample(0.0)
    before = meter.sample(1.0)
    cpu.seconds[worker.pid] = None
    assert meter.sample(2.0) == before
    assert "'a'" in meter.warnings[0]


def test_two_workers_of_one_id_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="share an id"):
        ModelMeter([site("a"), site("a")], PowerModel({"": Watts(idle_w=1, busy_w=2)}), Cpu())


def test_psutil_sees_the_cpu_time_of_a_real_process() -> None:
    read = process_cpu_seconds()
    before = read(os.getpid())
    until = time.perf_counter() + 0.1
    while time.perf_counter() < until:
        pass
    after = read(os.getpid())
    assert before is not None
    assert after is not None
    assert 0.0 < after - before < 5.0
    assert read(2**22 + 1) is None
