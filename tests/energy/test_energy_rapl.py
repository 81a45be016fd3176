"""The RAPL meter against a powercap tree of our own."""

from pathlib import Path

import pytest

from kvrelay.energy.rapl import RaplMeter
from kvrelay.energy.records import WorkerSite
from kvrelay.errors import EnergyUnavailable

CPU = [WorkerSite(worker_id="p0", pid=1, device="cpu"), WorkerSite(worker_id="d0", pid=2, device="cpu")]
RANGE_UJ = 262_143_328_850


def zone(root: Path, number: str, name: str, energy_uj: int = 0) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    set_energy(folder, energy_uj)
    return folder


def set_energy(folder: Path, energy_uj: int) -> None:
    (folder / "energy_uj").write_text(f"{energy_uj}\n")


def test_counts_packages_and_separate_dram_and_no_part_twice(tmp_path: Path) -> None:
    zones = [("0", "package-0"), ("0:0", "core"), ("0:1", "uncore"), ("0:2", "dram"), ("1", "package-1")]
    for number, name in [*zones, ("2", "psys")]:
        zone(tmp_path, number, name)
    (tmp_path / "intel-rapl-mmio:0").mkdir()
    meter = RaplMeter(CPU, tmp_path)
    assert [domain.name for domain in meter.domains] == [
        "intel-rapl:0/package-0",
        "intel-rapl:0:2/dram",
        "intel-rapl:1/package-1",
    ]
    assert {domain.worker_ids for domain in meter.domains} == {("p0", "d0")}
    assert meter.source == "rapl"


def test_microjoules_become_joules_from_the_first_sample_on(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0", 5_000_000)
    meter = RaplMeter(CPU, tmp_path)
    assert meter.sample(0.0) == {"intel-rapl:0/package-0": 0.0}
    set_energy(package, 7_500_000)
    assert meter.sample(0.1) == {"intel-rapl:0/package-0": 2.5}


def test_two_wraps_lose_nothing(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0", RANGE_UJ - 1_000_000)
    meter = RaplMeter(CPU, tmp_path)
    meter.sample(0.0)
    readings = [(0.1, 2_000_000), (1000.0, RANGE_UJ - 500_000), (1000.1, 500_000)]
    for now_s, energy_uj in readings:
        set_energy(package, energy_uj)
        joules = meter.sample(now_s)["intel-rapl:0/package-0"]
    assert joules == pytest.approx(3.0 + (RANGE_UJ - 2_500_000) / 1e6 + 1.0)
    assert meter.warnings == ()


def test_a_fall_that_no_wrap_explains_is_a_reset(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0", 90_000_000_000)
    meter = RaplMeter(CPU, tmp_path)
    meter.sample(0.0)
    set_energy(package, 1_000_000)
    assert meter.sample(0.1)["intel-rapl:0/package-0"] == pytest.approx(1.0)
    assert "reset" in meter.warnings[0]


def test_closed_file_is_named_with_its_permission(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0")
    (package / "energy_uj").chmod(0o400)

    def read(path: Path) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return path.read_text()

    with pytest.raises(EnergyUnavailable, match=r"intel-rapl:0/energy_uj may not be read \(mode 0400, owner"):
        RaplMeter(CPU, tmp_path, read)


def test_no_tree_garbage_and_gpu_workers_are_unavailable(tmp_path: Path) -> None:
    with pytest.raises(EnergyUnavailable, match="no intel-rapl package under"):
        RaplMeter(CPU, tmp_path)
    package = zone(tmp_path, "0", "package-0")
    with pytest.raises(EnergyUnavailable, match="g0 on cuda:0"):
        RaplMeter([*CPU, WorkerSite(worker_id="g0", pid=3, device="cuda:0")], tmp_path)
    (package / "energy_uj").write_text("many")
    with pytest.raises(EnergyUnavailable, match="expected a count of microjoules, got 'many'"):
        RaplMeter(CPU, tmp_path)


def test_zone_that_vanishes_later_is_a_typed_error(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0")
    meter = RaplMeter(CPU, tmp_path)
    (package / "energy_uj").unlink()
    with pytest.raises(EnergyUnavailable, match="energy_uj: No such file"):
        meter.sample(0.0)
