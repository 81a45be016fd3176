"""One engine's metric values, and their text for Prometheus. No process globals: two engines, two registries.

Knows the catalogue and nothing else of the engine. Used on one thread. What was never set does not appear:
unknown is not 0.
"""

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from kvrelay.metrics.catalogue import METRICS, PREFIX, VLLM_PREFIX, Metric

Labels = tuple[str, ...]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Histogram:
    def __init__(self, buckets: tuple[float, ...]) -> None:
        self.bounds = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.total = 0.0

    def cumulative(self) -> list[tuple[str, float]]:
        running, result = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            running += count
            result.append((bound, float(running)))
        return result


class MetricRegistry(Collector):
    """Values by metric and labels. Every name must be in the catalogue, with exactly its labels.

    `alias="vllm"` shows the metrics that vLLM has under its prefix and labels too.
    """

    def __init__(self, model_name: str, alias: str | None = None) -> None:
        self._model_name, self._alias = model_name, alias
        self._values: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, _Histogram]] = {}

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """A gauge's value; None takes it away."""
        series = self._series(name, "gauge", labels)
        if value is None:
            series.pop(labels, None)
        else:
            series[labels] = value

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Count something."""
        assert amount >= 0, f"{name} would go down"
        series = self._series(name, "counter", labels)
        series[labels] = series.get(labels, 0.0) + amount

    def set_total(self, name: str, total: float | None, *labels: str) -> None:
        """A counter that somebody else keeps; it never goes down, and None leaves it as it is."""
        if total is not None:
            series = self._series(name, "counter", labels)
            series[labels] = max(total, series.get(labels, 0.0))

    def observe(self, name: str, value: float, *labels: str) -> None:
        """One value of a histogram."""
        metric = _checked(name, "histogram", labels)
        series = self._histograms.setdefault(name, {})
        histogram = series.get(labels)
        if histogram is None:
            histogram = series[labels] = _Histogram(metric.buckets)
        histogram.counts[bisect_left(histogram.bounds, value)] += 1
        histogram.total += value

    def collect(self) -> Iterator[Family]:
        """What Prometheus' own registry asks for."""
        for name, metric in METRICS.items():
            if self._values.get(name) or self._histograms.get(name):
                yield self._family(metric, PREFIX, {"model_name": self._model_name})
                if self._alias == "vllm" and metric.vllm:
                    yield self._family(metric, VLLM_PREFIX, {"engine": "0", "model_name": self._model_name})

    def render(self) -> bytes:
        """The text exposition, of type `CONTENT_TYPE`."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def _series(self, name: str, kind: str, labels: Labels) -> dict[Labels, float]:
        _checked(name, kind, labels)
        return self._values.setdefault(name, {})

    def _family(self, metric: Metric, prefix: str, constant: dict[str, str]) -> Family:
        name, labels = prefix + metric.name, [*constant, *metric.labels]
        fixed = list(constant.values())
        if metric.kind == "histogram":
            histogram = HistogramMetricFamily(name, metric.help, labels=labels)
            for own, values in self._histograms[metric.name].items():
                histogram.add_metric([*fixed, *own], values.cumulative(), values.total)
            return histogram
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family: Family = kind(name, metric.help, labels=labels)
        for own, value in self._values[metric.name].items():
            family.add_metric([*fixed, *own], value)  # type: ignore[attr-defined]
        return family


def _checked(name: str, kind: str, labels: Labels) -> Metric:
    metric = METRICS[name]
    assert metric.kind == kind, f"{name} is a {metric.kind}"
    assert len(labels) == len(metric.labels), f"{name} has labels {metric.labels}, got {labels}"
    return metric
