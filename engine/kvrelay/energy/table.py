"""The table of meters, the choice among them, and what this host offers."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from kvrelay.energy.meter import Meter, MeterClass
from kvrelay.energy.power_model import PowerModel
from kvrelay.energy.records import WorkerSite
from kvrelay.errors import EnergyUnavailable, InvalidConfig, UnknownName

METERS = {
    "nvml": "kvrelay.energy.nvml:NvmlMeter",
    "rapl": "kvrelay.energy.rapl:RaplMeter",
    "model": "kvrelay.energy.model:ModelMeter",
    "none": "kvrelay.energy.none:NoMeter",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterStatus:
    """Whether a meter can be read on this host; `detail` says what it reads, or the reason and the remedy."""

    name: str
    available: bool
    detail: str


def open_meter(name: str, workers: Sequence[WorkerSite], power_model: PowerModel | None = None) -> Meter:
    """The meter of that name; with `auto`, the best there is, whose `why` tells how it was chosen.

    `auto` takes `nvml` when every worker is on CUDA, `rapl` when every worker is on the CPU, and if that
    cannot be read `model` when watts were declared, else `none`. A name other than `auto` never falls back.

    Raises `UnknownName`; `EnergyUnavailable` when the named meter cannot be read; `InvalidConfig` when the
    declared watts do not fit the workers, or two workers share an id.
    """
    if len({site.worker_id for site in workers}) < len(workers):
        raise InvalidConfig(f"two workers share an id among {[site.worker_id for site in workers]}")
    if name == "auto":
        return _open_auto(workers, power_model)
    return _meter_class(name).open(workers, power_model)


def doctor() -> list[MeterStatus]:
    """For each meter: what it reads here, or why it cannot and what to install or permit."""
    return [_status(name) for name in METERS]


def _open_auto(workers: Sequence[WorkerSite], power_model: PowerModel | None) -> Meter:
    measured, reason = _choose_measured(workers)
    if measured:
        try:
            meter = _meter_class(measured).open(workers, power_model)
        except EnergyUnavailable as error:
            reason = str(error)
        else:
            unused = "; the declared watts are not used" if power_model else ""
            meter.why = f"auto: {reason}{unused}"
            return meter
    modelled = "model" if power_model else "none"
    meter = _meter_class(modelled).open(workers, power_model)
    chosen = "watts were declared" if power_model else "no watts declared (--power-model idle_w=5,busy_w=20)"
    meter.why = f"auto: {reason}; {chosen}"
    return meter


def _choose_measured(workers: Sequence[WorkerSite]) -> tuple[str, str]:
    if workers and all(site.on_cuda for site in workers):
        return "nvml", "all workers are on CUDA and NVML reads their boards"
    if workers and all(site.device == "cpu" for site in workers):
        return "rapl", "all workers are on the CPU and RAPL reads its packages"
    return "", f"no one meter covers workers on {sorted({site.device for site in workers})}"


def _meter_class(name: str) -> MeterClass:
    if name not in METERS:
        raise UnknownName(f"unknown energy meter {name!r}; expected one of {sorted([*METERS, 'auto'])}")
    module, _, attribute = METERS[name].partition(":")
    return cast(MeterClass, getattr(importlib.import_module(module), attribute))


def _status(name: str) -> MeterStatus:
    try:
        return MeterStatus(name=name, available=True, detail=_meter_class(name).probe())
    except EnergyUnavailable as error:
        return MeterStatus(name=name, available=False, detail=str(error))
