"""The choice among meters, and what it says about it."""

from pathlib import Path

import pytest

from energy.stub_nvml import StubNvml, constant_board
from kvrelay.energy import METERS, WorkerSite, doctor, nvml, open_meter, parse_power_model
from kvrelay.energy.rapl import RaplMeter
from kvrelay.errors import EnergyUnavailable, InvalidConfig, UnknownName

CPU = [WorkerSite(worker_id="w", pid=1, device="cpu")]
CUDA = [WorkerSite(worker_id="w", pid=1, device="cuda:0")]
WATTS = parse_power_model("idle_w=5,busy_w=20")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without driver and without RAPL."""
    monkeypatch.setattr(nvml, "load_nvml", lambda: StubNvml([], driver=False))
    monkeypatch.setattr(RaplMeter.__init__, "__defaults__", (tmp_path, Path.read_text))
    return tmp_path


def package(root: Path) -> None:
    zone = root / "intel-rapl:0"
    zone.mkdir()
    for name, text in [("name", "package-0"), ("energy_uj", "7"), ("max_energy_range_uj", "99")]:
        (zone / name).write_text(text)


def test_auto_takes_none_on_a_bare_host_and_says_why(bare: Path) -> None:
    meter = open_meter("auto", CPU)
    assert (meter.source, meter.domains) == (None, ())
    assert "no intel-rapl package" in meter.why
    assert "--power-model" in meter.why


@pytest.mark.parametrize(
    ("workers", "reason"), [(CPU, "intel-rapl"), (CUDA, "Driver"), (CPU + CUDA, "no one meter")]
)
def test_auto_takes_declared_watts_when_nothing_can_be_read(
    bare: Path, workers: list[WorkerSite], reason: str
) -> None:
    sites = [WorkerSite(worker_id=f"w{i}", pid=1, device=w.device) for i, w in enumerate(workers)]
    meter = open_meter("auto", sites, WATTS)
    assert meter.source == "model(idle_w=5,busy_w=20)"
    assert reason in meter.why


def test_auto_prefers_what_is_measured_to_what_is_declared(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(bare)
    monkeypatch.setattr(nvml, "load_nvml", lambda: StubNvml([constant_board(1.0)]))
    assert open_meter("auto", CPU, WATTS).source == "rapl"
    meter = open_meter("auto", CUDA, WATTS)
    assert meter.source == "nvml-counter"
    assert "declared watts are not used" in meter.why


def test_auto_does_not_swallow_wrong_watts(bare: Path) -> None:
    with pytest.raises(InvalidConfig, match="no worker answers"):
        open_meter("auto", CPU, parse_power_model("gpu:idle_w=5,busy_w=20"))


@pytest.mark.parametrize(
    ("name", "workers", "reason"),
    [
        ("nvml", CUDA, "driver"),
        ("nvml", CPU, "nvml:"),
        ("rapl", CPU, "intel-rapl"),
        ("model", CPU, "no watts declared"),
    ],
)
def test_a_named_meter_never_falls_back(
    bare: Path, name: str, workers: list[WorkerSite], reason: str
) -> None:
    with pytest.raises(EnergyUnavailable, match=reason):
        open_meter(name, workers)


def test_unknown_name_lists_the_table() -> None:
    with pytest.raises(UnknownName, match=r"'watts'.*'auto', 'model', 'none', 'nvml', 'rapl'"):
        open_meter("watts", CPU)
    with pytest.raises(InvalidConfig, match="share an id"):
        open_meter("auto", CPU + CPU)


def test_doctor_has_a_line_for_every_meter(bare: Path) -> None:
    found = {status.name: status for status in doctor()}
    assert list(found) == list(METERS)
    assert {name for name, status in found.items() if status.available} == {"model", "none"}
    assert "install the NVIDIA driver" in found["nvml"].detail
    assert "bare metal" in found["rapl"].detail


def test_doctor_describes_what_is_there(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(bare)
    monkeypatch.setattr(nvml, "load_nvml", lambda: StubNvml([constant_board(1.0)]))
    found = {status.name: status for status in doctor()}
    assert found["nvml"].detail == "1 x Stub 100: nvml-counter"
    assert found["rapl"].detail == "intel-rapl:0/package-0"


@pytest.mark.parametrize("name", sorted(METERS))
def test_every_meter_in_the_table_conforms(name: str, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(bare)
    monkeypatch.setattr(nvml, "load_nvml", lambda: StubNvml([constant_board(1.0)]))
    meter = open_meter(name, CUDA if name == "nvml" else CPU, WATTS)
    names = {domain.name for domain in meter.domains}
    first, second = meter.sample(1.0), meter.sample(2.0)
    assert set(first) == set(second) == names
    assert all(0.0 == first[key] <= second[key] for key in names)
    assert (meter.source is None) == (not names)
    assert all("w" in domain.worker_ids for domain in meter.domains)
    assert meter.why
    meter.close()
