"""What is told about energy: of one request, of one worker, of all. None means unknown, never 0 joules."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kvrelay.types import Phase

MIN_UPDATES = 20  # counter updates below which a window's joules are mostly rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnergy:
    """Joules of one request: its share, by tokens, of every step it took part in. Idle is nobody's.

    `settled` is False while a part of its time is not yet covered by the counter or by all workers'
    reports: the figures may still change. A phase is None when nothing is known of it.
    """

    prefill_j: float | None = None
    transfer_j: float | None = None
    decode_j: float | None = None
    source: str | None = None
    settled: bool = False
    num_updates: int = 0
    short_window: bool = False

    @property
    def total_j(self) -> float | None:
        """Sum over the phases of which something is known."""
        known = [joules for joules in (self.prefill_j, self.transfer_j, self.decode_j) if joules is not None]
        return sum(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnergy:
    """Joules of one worker; `idle_j` is None when it shares its counters with others. `cpu_s` in steps."""

    prefill_j: float | None = None
    transfer_j: float | None = None
    decode_j: float | None = None
    idle_j: float | None = None
    cpu_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyReport:
    """Joules of a window: prefill + transfer + decode + idle = gross; net = gross - idle.

    `source` names the one meter. `reason` says why figures are None. `window_s` runs from the first
    to the last counter update, of which there were `num_updates` (the least over the domains); fewer than
    `MIN_UPDATES` make a `short_window`. `provisional_s` at the window's end may still move between phases and
    idle, its gross stands. `unassigned_j` is the part of net that no request was named for. `lower_j` and
    `upper_j` (modelled sources only) are idle watts and busy watts times the window.
    """

    source: str | None
    reason: str | None = None
    prefill_j: float | None = None
    transfer_j: float | None = None
    decode_j: float | None = None
    idle_j: float | None = None
    gross_j: float | None = None
    net_j: float | None = None
    unassigned_j: float | None = None
    lower_j: float | None = None
    upper_j: float | None = None
    window_s: float = 0.0
    provisional_s: float = 0.0
    num_updates: int = 0
    workers: Mapping[str, WorkerEnergy] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def short_window(self) -> bool:
        """True when something was measured over fewer than `MIN_UPDATES` counter updates."""
        return self.source is not None and self.num_updates < MIN_UPDATES

    @property
    def short_window_reason(self) -> str | None:
        """Why the window is too short, in words."""
        if not self.short_window:
            return None
        return f"{self.num_updates} counter updates in {self.window_s:.3g} s; needs {MIN_UPDATES}"

    def phase_j(self, phase: Phase) -> float | None:
        """Joules of one phase."""
        return {"prefill": self.prefill_j, "transfer": self.transfer_j, "decode": self.decode_j}[phase]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the flags."""
        return {
            **asdict(self),
            "short_window": self.short_window,
            "short_window_reason": self.short_window_reason,
        }
