"""Energy: meters, and the account that attributes their joules to phases, workers and requests.

Knows no tensors, sockets or schedulers. The router opens one meter, runs one `EnergyReader`, and feeds it
each worker's `StepReport` as an `Activity` and each `Heartbeat`.
"""

from kvrelay.energy.account import EnergyAccount
from kvrelay.energy.meter import Meter
from kvrelay.energy.power_model import PowerModel, Watts, parse_power_model
from kvrelay.energy.reader import EnergyReader
from kvrelay.energy.records import Activity, Domain, WorkerSite
from kvrelay.energy.report import MIN_UPDATES, EnergyReport, RequestEnergy, WorkerEnergy
from kvrelay.energy.table import METERS, MeterStatus, doctor, open_meter

__all__ = [
    "METERS",
    "MIN_UPDATES",
    "Activity",
    "Domain",
    "EnergyAccount",
    "EnergyReader",
    "EnergyReport",
    "Meter",
    "MeterStatus",
    "PowerModel",
    "RequestEnergy",
    "Watts",
    "WorkerEnergy",
    "WorkerSite",
    "doctor",
    "open_meter",
    "parse_power_model",
]
