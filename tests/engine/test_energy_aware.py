"""`energy_aware` spends fewer joules per token than `round_robin` on unequal workers, at equal SLO."""

import json
from pathlib import Path

import pytest

from kvrelay.config import EngineConfig
from kvrelay.energy.report import WorkerEnergy
from kvrelay.errors import InvalidConfig
from kvrelay.router.load import DecodeSpeed, Job, Load, Pair
from kvrelay.router.measure import net_watts
from kvrelay.router.policies import open_policy
from kvrelay.types import WorkerId
from tiny_engine import tiny_llm

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_sample_of_the_benchmark_meets_its_gate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import routing

    monkeypatch.setattr(routing, "LOADS", (0.3,))
    routing.main(["--seconds", "30", "--seeds", "1", "--out", str(tmp_path)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "routing.json").read_text())
    assert record["gate"]["passed"]
    rows = record["results"]["by_load"]["30%"]
    assert rows["energy_aware"]["joules_per_token"] < 0.9 * rows["round_robin"]["joules_per_token"]
    assert rows["energy_aware"]["slo_attained"] >= rows["round_robin"]["slo_attained"] > 0.9


def test_the_committed_record_passed_its_gate() -> None:
    record = json.loads((BENCHMARKS / "results" / "routing.json").read_text())
    assert record["gate"]["passed"]
    assert record["dirty"] is False


def worker(worker_id: str, watts: float, num_requests: int = 0) -> Load:
    load = Load(WorkerId(worker_id), num_requests=num_requests)
    load.watts = {"prefill": watts, "decode": watts}
    load.add_prefill(1000, 1.0)
    for count in (1, 10):
        load.decode_speed.add(count, 0.010 + 0.001 * count)
    return load


def chosen(pairs: list[Pair], **slo: float) -> str:
    return open_policy("energy_aware").choose(Job(100, 10, num_others=4, **slo), pairs).decode.worker_id  # type: ignore[arg-type]


def test_the_thriftier_pair_wins_though_the_other_has_the_fuller_batch() -> None:
    thrifty, hungry = worker("a", 100.0), worker("b", 200.0, num_requests=4)
    assert chosen([Pair(hungry, hungry), Pair(thrifty, thrifty)]) == "a"


def test_the_slo_comes_before_the_joules_and_then_the_soonest() -> None:
    thrifty, hungry = worker("a", 100.0), worker("b", 200.0)
    thrifty.num_prefill_tokens = 5000
    pairs = [Pair(thrifty, thrifty), Pair(hungry, hungry)]
    assert chosen(pairs, slo_ttft_s=10.0) == "a"
    assert chosen(pairs, slo_ttft_s=1.0) == "b"
    assert chosen(pairs, slo_ttft_s=0.01) == "b", "neither keeps it: the soonest"
    thrifty.num_prefill_tokens, thrifty.num_requests = 0, 30
    assert chosen(pairs, slo_itl_s=0.02) == "b"


def test_what_is_not_known_yet_is_tried() -> None:
    known, unknown = worker("a", 1.0), Load(WorkerId("b"))
    assert chosen([Pair(known, known), Pair(unknown, unknown)]) == "b"


def test_step_seconds_are_a_line_over_the_batch() -> None:
    speed = DecodeSpeed()
    assert speed.step_s(1) is None
    speed.add(4, 0.02)
    assert speed.step_s(100) == pytest.approx(0.02), "one size seen: nothing is known of others"
    for _ in range(200):
        for count in (1, 8, 16):
            speed.add(count, 0.010 + 0.001 * count)
    assert speed.step_s(32) == pytest.approx(0.042, rel=0.01)
    for _ in range(2000):
        for count in (1, 8, 16):
            speed.add(count, 0.020 + 0.002 * count)
    assert speed.step_s(8) == pytest.approx(0.036, rel=0.01), "the worker has become slower"


def test_watts_are_above_the_workers_own_idle_draw() -> None:
    busy_s = {"prefill": 2.0, "transfer": 1.0, "decode": 3.0}
    energy = WorkerEnergy(prefill_j=200.0, transfer_j=5.0, decode_j=240.0, idle_j=50.0)
    assert net_watts(energy, busy_s, 10.0) == {"prefill": 90.0, "decode": 70.0}  # type: ignore[arg-type]
    shared = WorkerEnergy(prefill_j=200.0, decode_j=240.0, idle_j=None)
    assert net_watts(shared, busy_s, 10.0) == {"prefill": 100.0, "decode": 80.0}  # type: ignore[arg-type]
    unused = {"prefill": 0.0, "transfer": 0.0, "decode": 0.0}
    assert net_watts(WorkerEnergy(), unused, 10.0) == {}  # type: ignore[arg-type]


def test_without_joules_it_is_refused_not_replaced(tiny_directory: Path) -> None:
    with pytest.raises(InvalidConfig, match="needs joules"):
        tiny_llm(tiny_directory, policy="energy_aware", meter="none")
    assert EngineConfig.of(model="m", policy="energy_aware").policy == "energy_aware"
