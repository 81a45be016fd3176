"""The meter of a host without meters: measures nothing and says so."""

from collections.abc import Sequence

from kvrelay.energy.power_model import PowerModel
from kvrelay.energy.records import Domain, WorkerSite


class NoMeter:
    """Every figure behind it is None, never 0."""

    source = None
    domains: tuple[Domain, ...] = ()
    warnings: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.why = "asked for by name"

    @classmethod
    def open(cls, sites: Sequence[WorkerSite], power_model: PowerModel | None) -> "NoMeter":
        """Always opens."""
        return cls()

    @classmethod
    def probe(cls) -> str:
        """Always there."""
        return "measures nothing; energy is null"

    def sample(self, now_s: float) -> dict[str, float]:
        """No domain, no joules."""
        return {}

    def close(self) -> None:
        """Nothing is held open."""
