"""What a meter is. Add one with a file that holds a class of this shape and a line in `METERS`."""

from collections.abc import Sequence
from typing import Protocol

from kvrelay.energy.power_model import PowerModel
from kvrelay.energy.records import Domain, WorkerSite


class Meter(Protocol):
    """A source of cumulative joules; one meter, and so one source, per account.

    `why` says why this meter was taken.
    """

    why: str

    @property
    def source(self) -> str | None:
        """`nvml-counter`, `nvml-power`, `rapl`, `model(...)` with its watts, or None: nothing is measured."""

    @property
    def domains(self) -> tuple[Domain, ...]:
        """The physical counters and the workers that share each."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the figures must know, such as a counter that was reset."""

    def sample(self, now_s: float) -> dict[str, float]:
        """Joules per domain name since the first sample, never falling. Raises `EnergyUnavailable`."""

    def close(self) -> None:
        """Releases what was opened."""


class MeterClass(Protocol):
    """What `METERS` names: a class that opens its meter, or says why it cannot."""

    def open(self, sites: Sequence[WorkerSite], power_model: PowerModel | None) -> Meter:
        """A meter for these workers. Raises `EnergyUnavailable` with the reason and the remedy."""

    def probe(self) -> str:
        """What this host offers, in words. Raises `EnergyUnavailable` likewise."""
