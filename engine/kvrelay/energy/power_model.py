"""Watts that the user declares for a worker, and the text they are written in.

Grammar: clauses separated by `;`, each `[KEY:]idle_w=WATTS,busy_w=WATTS`. KEY is a worker id, one device
(`cuda:1`), a role (`prefill`, `decode`, `colocated`) or a kind of device (`cpu`, `cuda`), the first that
fits in this order; a clause without KEY is for all the rest. Examples: `idle_w=5,busy_w=20`;
`prefill:idle_w=10,busy_w=60;decode:idle_w=10,busy_w=30`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvrelay.energy.records import WorkerSite
from kvrelay.errors import InvalidConfig

FIELDS = ("idle_w", "busy_w")
EXAMPLE = "idle_w=5,busy_w=20 or prefill:idle_w=5,busy_w=20;decode:idle_w=5,busy_w=9"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watts:
    """Power of one worker at rest and with all its compute threads busy. Raises `InvalidConfig`."""

    idle_w: float
    busy_w: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.idle_w) and self.idle_w >= 0.0):
            raise InvalidConfig(f"power_model: idle_w={self.idle_w:g}: expected finite watts >= 0")
        if not (math.isfinite(self.busy_w) and self.busy_w >= self.idle_w):
            raise InvalidConfig(
                f"power_model: busy_w={self.busy_w:g}: expected finite watts >= idle_w={self.idle_w:g}"
            )

    def __str__(self) -> str:
        return f"idle_w={self.idle_w:g},busy_w={self.busy_w:g}"


@dataclass(frozen=True, slots=True)
class PowerModel:
    """Declared watts by worker id, device or role; key `""` stands for all the rest."""

    by_key: Mapping[str, Watts]

    @property
    def label(self) -> str:
        """The source string that every modelled joule carries: `model(idle_w=5,busy_w=20)`."""
        clauses = (f"{key}:{watts}" if key else str(watts) for key, watts in sorted(self.by_key.items()))
        return f"model({';'.join(clauses)})"

    def watts_of(self, site: WorkerSite) -> Watts:
        """The most specific entry: worker id, one device (`cuda:1`), role, kind of device (`cuda`), the rest.

        Raises `InvalidConfig` when nothing was declared for this worker.
        """
        for key in _keys_of(site):
            if key in self.by_key:
                return self.by_key[key]
        raise InvalidConfig(
            f"power_model: nothing declared for worker {site.worker_id!r} ({site.role} on {site.device}); "
            f"declared: {sorted(self.by_key)}"
        )

    def check_keys(self, sites: Sequence[WorkerSite]) -> None:
        """Raises `InvalidConfig` for a key that no worker answers to."""
        known = {key for site in sites for key in _keys_of(site)}
        unknown = sorted(set(self.by_key) - known)
        if unknown:
            raise InvalidConfig(
                f"power_model: no worker answers to {unknown}; expected one of {sorted(known - {''})}"
            )


def parse_power_model(text: str) -> PowerModel:
    """Reads the grammar at the top of this file. Raises `InvalidConfig`, naming the field."""
    by_key: dict[str, Watts] = {}
    for clause in text.split(";"):
        key, _, fields = clause.strip().rpartition(":")
        key = key.strip()
        if key in by_key:
            raise InvalidConfig(f"power_model: {key or 'the default'} is declared twice in {text!r}")
        by_key[key] = _parse_watts(fields, clause)
    return PowerModel(by_key)


def _parse_watts(fields: str, clause: str) -> Watts:
    values: dict[str, float] = {}
    for field in fields.split(","):
        name, equals, number = (part.strip() for part in field.partition("="))
        if not equals or name not in FIELDS:
            raise InvalidConfig(f"power_model: {field.strip()!r} in {clause.strip()!r}: expected {EXAMPLE}")
        if name in values:
            raise InvalidConfig(f"power_model: {name} is given twice in {clause.strip()!r}")
        values[name] = _parse_number(name, number)
    missing = [name for name in FIELDS if name not in values]
    if missing:
        raise InvalidConfig(f"power_model: {missing[0]} is missing in {clause.strip()!r}; expected {EXAMPLE}")
    return Watts(idle_w=values["idle_w"], busy_w=values["busy_w"])


def _parse_number(name: str, number: str) -> float:
    try:
        return float(number)
    except ValueError as error:
        raise InvalidConfig(f"power_model: {name}={number!r}: expected a number of watts") from error


def _keys_of(site: WorkerSite) -> tuple[str, ...]:
    kind = "cuda" if site.on_cuda else site.device.partition(":")[0]
    named_device = () if site.device == kind else (site.device,)
    return (site.worker_id, *named_device, site.role, kind, "")
