"""Energy of CPU packages through Linux's powercap tree (Intel RAPL, also AMD since Linux 5.11).

Knows files under /sys/class/powercap. Counts `package-*` and, where it stands apart, `dram`; leaves out
`core` and `uncore` (parts of the package) and `psys` (which contains it).
https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from kvrelay.energy.counter import WrappingCounter
from kvrelay.energy.power_model import PowerModel
from kvrelay.energy.records import Domain, WorkerSite
from kvrelay.errors import EnergyUnavailable

ROOT = Path("/sys/class/powercap")
MAX_PACKAGE_W = 5000.0

ReadText = Callable[[Path], str]


class RaplMeter:
    """Joules of every CPU package and separate DRAM domain of the host, each shared by all workers.

    Raises `EnergyUnavailable` when there is none, when a file may not be read (the message names it and the
    permission), or when a worker computes on something that is not the CPU.
    """

    def __init__(
        self, sites: Sequence[WorkerSite], root: Path = ROOT, read: ReadText = Path.read_text
    ) -> None:
        self.why = "asked for by name"
        elsewhere = [f"{site.worker_id} on {site.device}" for site in sites if site.device != "cpu"]
        if elsewhere:
            raise EnergyUnavailable(f"rapl: measures the CPU only; not on it: {', '.join(elsewhere)}")
        self._read = read
        self._zones = {_zone_name(zone, read): _Zone(zone, read) for zone in find_zones(root, read)}
        workers = tuple(site.worker_id for site in sites)
        self._domains = tuple(Domain(name=name, worker_ids=workers) for name in self._zones)

    @classmethod
    def open(cls, sites: Sequence[WorkerSite], power_model: PowerModel | None) -> "RaplMeter":
        """Opens this host's packages; declared watts are not used. Raises `EnergyUnavailable`."""
        return cls(sites)

    @classmethod
    def probe(cls) -> str:
        """The domains that can be read here. Raises `EnergyUnavailable`."""
        return ", ".join(domain.name for domain in cls([]).domains)

    @property
    def source(self) -> str:
        """`rapl`."""
        return "rapl"

    @property
    def domains(self) -> tuple[Domain, ...]:
        """One per package (and DRAM) zone, as `intel-rapl:0/package-0`."""
        return self._domains

    @property
    def warnings(self) -> tuple[str, ...]:
        """Counters that fell in a way no wrap explains."""
        return tuple(
            f"{name} was reset {zone.counter.num_resets} times; joules are missing"
            for name, zone in self._zones.items()
            if zone.counter.num_resets
        )

    def sample(self, now_s: float) -> dict[str, float]:
        """Joules per zone since the first sample. Raises `EnergyUnavailable`."""
        return {name: zone.sample(now_s, self._read) for name, zone in self._zones.items()}

    def close(self) -> None:
        """Nothing is held open."""


class _Zone:
    def __init__(self, zone: Path, read: ReadText) -> None:
        self._energy = zone / "energy_uj"
        _number(self._energy, read)
        wrap = _number(zone / "max_energy_range_uj", read)
        self.counter = WrappingCounter([wrap], units_per_joule=1e6, max_w=MAX_PACKAGE_W)

    def sample(self, now_s: float, read: ReadText) -> float:
        raw = _number(self._energy, read)
        return self.counter.advance(now_s, raw)


def find_zones(root: Path, read: ReadText = Path.read_text) -> list[Path]:
    """Zones whose energies add up without counting any part twice. Raises `EnergyUnavailable`."""
    zones = [
        zone
        for zone in sorted(root.glob("intel-rapl:*"))
        if _text(zone / "name", read).startswith(("package", "dram"))
    ]
    if not zones:
        raise EnergyUnavailable(
            f"rapl: no intel-rapl package under {root}; needs Linux on bare metal with the module "
            "intel_rapl_common (virtual machines and containers rarely show it)"
        )
    return zones


def _zone_name(zone: Path, read: ReadText) -> str:
    return f"{zone.name}/{_text(zone / 'name', read)}"


def _text(path: Path, read: ReadText) -> str:
    try:
        return read(path).strip()
    except PermissionError as error:
        raise EnergyUnavailable(
            f"rapl: {path} may not be read {_mode(path)}; `sudo chmod a+r {path}`, run as root, or grant "
            "CAP_DAC_READ_SEARCH"
        ) from error
    except OSError as error:
        raise EnergyUnavailable(f"rapl: {path}: {error.strerror or error}") from error


def _mode(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "(its folder is closed)"
    return f"(mode {status.st_mode & 0o7777:04o}, owner uid {status.st_uid})"


def _number(path: Path, read: ReadText) -> int:
    text = _text(path, read)
    if not text.isdecimal():
        raise EnergyUnavailable(f"rapl: {path}: expected a count of microjoules, got {text!r}")
    return int(text)
