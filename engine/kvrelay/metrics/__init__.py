"""What is measured: the latency ledger and the report, and `/metrics` (`catalogue`, `registry`)."""

from kvrelay.metrics.catalogue import CATALOGUE, METRICS, Metric
from kvrelay.metrics.registry import CONTENT_TYPE, MetricRegistry
from kvrelay.metrics.report import (
    SPANS,
    Ledger,
    PhaseReport,
    Report,
    Timings,
    WorkerReport,
    WorkerTotals,
    hidden_share,
    phase_report,
    ratio,
    worker_report,
)

__all__ = [
    "CATALOGUE",
    "CONTENT_TYPE",
    "METRICS",
    "SPANS",
    "Ledger",
    "Metric",
    "MetricRegistry",
    "PhaseReport",
    "Report",
    "Timings",
    "WorkerReport",
    "WorkerTotals",
    "hidden_share",
    "phase_report",
    "ratio",
    "worker_report",
]
