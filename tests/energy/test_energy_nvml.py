"""The NVML meter against boards whose joules follow from arithmetic."""

from collections.abc import Iterator

import pytest

from energy.stub_nvml import StubBoard, StubNvml, constant_board, ramp_board
from kvrelay.energy.account import EnergyAccount
from kvrelay.energy.nvml import NvmlMeter, describe
from kvrelay.energy.records import Activity, WorkerSite
from kvrelay.errors import EnergyUnavailable


def site(worker_id: str = "w0", device: str = "cuda:0", visible: str | None = None) -> WorkerSite:
    return WorkerSite(worker_id=worker_id, pid=1, device=device, visible_devices=visible)


def times(end_s: float, step_s: float) -> Iterator[float]:
    for index in range(round(end_s / step_s) + 1):
        yield index * step_s


def run(meter: NvmlMeter, nvml: StubNvml, end_s: float, step_s: float = 0.05) -> dict[str, float]:
    joules: dict[str, float] = {}
    for now_s in times(end_s, step_s):
        nvml.now_s = now_s
        later = meter.sample(now_s)
        assert all(later[name] >= joules.get(name, 0.0) for name in later)
        joules = later
    return joules


def test_constant_power_is_watts_times_seconds() -> None:
    nvml = StubNvml([constant_board(300.0, start_mj=123_456_789)])
    meter = NvmlMeter([site()], nvml)
    assert run(meter, nvml, 4.0) == {"GPU-a": pytest.approx(1200.0, abs=1e-3)}
    assert meter.source == "nvml-counter"
    assert meter.warnings == ()


def test_ramp_is_half_slope_times_time_squared() -> None:
    nvml = StubNvml([ramp_board(100.0)])
    assert run(NvmlMeter([site()], nvml), nvml, 4.0)["GPU-a"] == pytest.approx(800.0, abs=1e-3)


def test_100_ms_steps_are_attributed_over_the_time_between_updates() -> None:
    nvml = StubNvml([constant_board(200.0, step_s=0.1)])
    meter = NvmlMeter([site()], nvml)
    account = EnergyAccount(meter.domains, meter.source)
    account.add_activity(
        Activity(worker_id="w0", phase="decode", start_s=0.0, end_s=1.05, num_tokens={"r": 1})
    )
    for now_s in times(2.0, 0.02):
        nvml.now_s = now_s
        account.add_sample(now_s, meter.sample(now_s))
    report = account.snapshot(2.0)
    assert report.num_updates == 20
    assert report.gross_j == pytest.approx(400.0)
    assert report.decode_j == pytest.approx(210.0)


@pytest.mark.parametrize("modulus_mj", [2**32, 2**64])
def test_wrap_of_the_counter_loses_nothing(modulus_mj: int) -> None:
    nvml = StubNvml([constant_board(500.0, start_mj=modulus_mj - 700_000, modulus_mj=modulus_mj)])
    meter = NvmlMeter([site()], nvml)
    assert run(meter, nvml, 3.0)["GPU-a"] == pytest.approx(1500.0, abs=1e-3)
    assert meter.warnings == ()


def test_reset_of_the_counter_is_reported_and_never_negative() -> None:
    board = constant_board(100.0, start_mj=9_000_000_000)
    nvml = StubNvml([board])
    meter = NvmlMeter([site()], nvml)
    before = run(meter, nvml, 1.0)["GPU-a"]
    board.start_mj = -100_000
    nvml.now_s = 1.05
    assert meter.sample(1.05)["GPU-a"] - before == pytest.approx(5.0, abs=1e-3)
    assert "reset 1 times" in meter.warnings[0]


@pytest.mark.parametrize("step_s", [0.05, 0.2])
def test_without_counter_power_is_integrated_and_the_source_says_so(step_s: float) -> None:
    nvml = StubNvml([ramp_board(100.0, has_counter=False)])
    meter = NvmlMeter([site()], nvml)
    assert meter.source == "nvml-power"
    assert "Not Supported" in meter.warnings[0]
    assert run(meter, nvml, 4.0, step_s)["GPU-a"] == pytest.approx(800.0, rel=1e-4)


def test_library_without_the_counter_function_falls_back_to_power() -> None:
    class OldNvml(StubNvml):
        @property
        def nvmlDeviceGetTotalEnergyConsumption(self) -> object:  # type: ignore[override]
            raise AttributeError("no such function")

    nvml = OldNvml([constant_board(50.0)])
    meter = NvmlMeter([site()], nvml)
    assert meter.source == "nvml-power"
    assert run(meter, nvml, 2.0)["GPU-a"] == pytest.approx(100.0)


def test_one_board_without_counter_makes_power_the_one_source() -> None:
    nvml = StubNvml([constant_board(50.0), constant_board(80.0, "GPU-b", has_counter=False)])
    meter = NvmlMeter([site("a"), site("b", "cuda:1")], nvml)
    assert meter.source == "nvml-power"
    assert run(meter, nvml, 1.0) == {"GPU-a": pytest.approx(50.0), "GPU-b": pytest.approx(80.0)}


def test_power_samples_between_refreshes_do_not_count_as_updates() -> None:
    nvml = StubNvml([constant_board(50.0, has_counter=False)])
    meter = NvmlMeter([site()], nvml)
    account = EnergyAccount(meter.domains, meter.source)
    for now_s in times(1.0, 0.01):
        nvml.now_s = now_s
        account.add_sample(now_s, meter.sample(now_s))
    assert account.snapshot(1.0).num_updates <= 10


def test_neither_counter_nor_power_is_unavailable_and_releases_the_library() -> None:
    nvml = StubNvml([StubBoard("GPU-a", lambda t: t, None, has_counter=False)])
    with pytest.raises(EnergyUnavailable, match="no power reading"):
        NvmlMeter([site()], nvml)
    assert nvml.num_open == 0


def test_two_boards_are_two_domains_shared_as_the_workers_are_placed() -> None:
    nvml = StubNvml([constant_board(100.0, "GPU-a"), constant_board(300.0, "GPU-b")])
    meter = NvmlMeter([site("p0", "cuda:1"), site("d0", "cuda:0"), site("d1", "cuda")], nvml)
    shared = {domain.name: domain.worker_ids for domain in meter.domains}
    assert shared == {"GPU-b": ("p0",), "GPU-a": ("d0", "d1")}
    assert run(meter, nvml, 2.0) == {"GPU-b": pytest.approx(600.0), "GPU-a": pytest.approx(200.0)}
    meter.close()
    assert nvml.num_open == 0


@pytest.mark.parametrize(
    ("device", "visible", "uuid"),
    [
        ("cuda:0", None, "GPU-a1"),
        ("cuda:1", None, "GPU-b2"),
        ("cuda:0", "1", "GPU-b2"),
        ("cuda:1", "1,0", "GPU-a1"),
        ("cuda", "GPU-b2", "GPU-b2"),
        ("cuda:0", " GPU-b ", "GPU-b2"),
        ("GPU-b2", "0", "GPU-b2"),
    ],
)
def test_device_names_find_their_board(device: str, visible: str | None, uuid: str) -> None:
    nvml = StubNvml([constant_board(1.0, "GPU-a1"), constant_board(1.0, "GPU-b2")])
    assert NvmlMeter([site(device=device, visible=visible)], nvml).domains[0].name == uuid


@pytest.mark.parametrize(
    ("device", "visible", "reason"),
    [
        ("cpu", None, "not an NVIDIA board"),
        ("cuda:2", None, "needs board 2, there are 2"),
        ("cuda:1", "0", "shows 1 boards"),
        ("cuda:0", "", "shows 0 boards"),
        ("cuda:1", "0,-1,1", "shows 1 boards"),
        ("cuda:x", None, "expected cuda, cuda:N or a UUID"),
        ("GPU-", None, "names 2 of"),
        ("GPU-c", None, "names 0 of"),
        ("MIG-1", None, "MIG slice"),
    ],
)
def test_device_names_that_find_no_board_say_why(device: str, visible: str | None, reason: str) -> None:
    nvml = StubNvml([constant_board(1.0, "GPU-a1"), constant_board(1.0, "GPU-b2")])
    with pytest.raises(EnergyUnavailable, match=reason):
        NvmlMeter([site(device=device, visible=visible)], nvml)
    assert nvml.num_open == 0


def test_an_index_among_boards_of_several_models_is_refused_and_a_uuid_is_not() -> None:
    nvml = StubNvml([constant_board(1.0, "GPU-a"), constant_board(1.0, "GPU-b", model="Stub 200")])
    with pytest.raises(EnergyUnavailable, match="UUID"):
        NvmlMeter([site(device="cuda:0")], nvml)
    assert NvmlMeter([site(device="GPU-b")], nvml).domains[0].name == "GPU-b"


def test_no_driver_no_board_and_a_lost_board_are_typed_errors() -> None:
    with pytest.raises(EnergyUnavailable, match="Driver Not Loaded"):
        NvmlMeter([site()], StubNvml([], driver=False))
    with pytest.raises(EnergyUnavailable, match="no board"):
        NvmlMeter([site()], StubNvml([]))
    nvml = StubNvml([constant_board(1.0)])
    meter = NvmlMeter([site()], nvml)
    nvml.lost = True
    with pytest.raises(EnergyUnavailable, match="GPU is lost"):
        meter.sample(1.0)


def test_describe_says_how_boards_are_read_and_leaves_nothing_open() -> None:
    nvml = StubNvml([constant_board(1.0), constant_board(1.0, "GPU-b")])
    assert describe(nvml) == "2 x Stub 100: nvml-counter"
    assert nvml.num_open == 0
