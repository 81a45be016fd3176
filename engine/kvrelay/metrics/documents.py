"""docs/metrics.md and the Grafana dashboard, written from the catalogue."""

from typing import Any

from kvrelay.metrics.catalogue import CATALOGUE, PREFIX, Metric

INTRODUCTION = """# Metrics

Every metric that `/metrics` may show. Written from `engine/kvrelay/metrics/catalogue.py` by
`python scripts/metrics_documents.py`; a test fails when it differs. Prometheus text format, prefix
`kvrelay:`; every series also has the label `model_name`. Where vLLM exports the same figure the name behind
the prefix is vLLM's, and `metrics_alias=vllm` (`kvrelay serve --metrics-alias vllm`) shows those under
`vllm:` too, with vLLM's labels. `grafana/kvrelay.json` is a dashboard with a panel for each.

What is unknown is absent, never 0: without a meter there is no energy metric, without an SLO no attainment. A
`source` label names the meter of every joule ([what each joule means](report.md#joules)).
"""

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 8, 7, 3


def metrics_page() -> str:
    """docs/metrics.md."""
    parts = [INTRODUCTION]
    for section in CATALOGUE:
        parts += [
            f"\n## {section.title}\n",
            "| metric | kind | unit | labels | meaning |",
            "|---|---|---|---|---|",
        ]
        parts += [_row(metric) for metric in section.metrics]
    return "\n".join(parts) + "\n"


def _row(metric: Metric) -> str:
    notes = [metric.help]
    if metric.vllm:
        notes.append("vLLM: same name.")
    if metric.also:
        notes.append(f"Elsewhere: {metric.also}.")
    if metric.needs:
        notes.append(f"Needs {metric.needs}.")
    labels = ", ".join(metric.labels)
    return f"| `{PREFIX}{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {' '.join(notes)} |"


def grafana_dashboard() -> dict[str, Any]:
    """A dashboard with a row for each section and a panel for each metric, ready to import."""
    panels: list[dict[str, Any]] = []
    y = 0
    for section in CATALOGUE:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": section.title,
                "gridPos": {"h": 1, "w": 24, "x": 0, "y": y},
                "panels": [],
            }
        )
        y += 1
        for index, metric in enumerate(section.metrics):
            column, row = index % COLUMNS, index // COLUMNS
            panels.append(_panel(metric, len(panels) + 1, column * PANEL_WIDTH, y + row * PANEL_HEIGHT))
        y += -(-len(section.metrics) // COLUMNS) * PANEL_HEIGHT
    return {
        "title": "kvrelay",
        "uid": "kvrelay",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {"list": [_data_source(), _model_variable()]},
        "panels": panels,
    }


def _panel(metric: Metric, panel_id: int, x: int, y: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend}
        for index, (expression, legend) in enumerate(_expressions(metric))
    ]
    per_second = metric.kind == "counter"
    return {
        "id": panel_id,
        "type": "timeseries",
        "title": metric.name + (" per second" if per_second else ""),
        "description": metric.help,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"h": PANEL_HEIGHT, "w": PANEL_WIDTH, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": _grafana_unit(metric), "min": 0}, "overrides": []},
        "targets": targets,
    }


def _expressions(metric: Metric) -> list[tuple[str, str]]:
    name, chosen = PREFIX + metric.name, '{model_name=~"$model_name"}'
    if metric.kind == "histogram":
        rate = f"sum by (le) (rate({name}_bucket{chosen}[1m]))"
        return [
            (f"histogram_quantile({share}, {rate})", f"p{int(100 * share)}") for share in (0.5, 0.9, 0.99)
        ]
    by = f" by ({', '.join(metric.labels)})" if metric.labels else ""
    legend = " ".join("{{" + label + "}}" for label in metric.labels) or metric.name
    inner = f"rate({name}{chosen}[1m])" if metric.kind == "counter" else f"{name}{chosen}"
    return [(f"sum{by} ({inner})", legend)]


def _grafana_unit(metric: Metric) -> str:
    known = {"seconds": "s", "bytes": "bytes", "joules": "joule", "watts": "watt", "ratio": "percentunit"}
    if metric.kind == "counter":  # shown as a rate
        return {"seconds": "percentunit", "bytes": "Bps", "joules": "watt"}.get(metric.unit, "short")
    return known.get(metric.unit, "short")


def _data_source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus"}


def _model_variable() -> dict[str, Any]:
    return {
        "name": "model_name",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values({PREFIX}worker_up, model_name)",
        "includeAll": True,
        "multi": True,
        "refresh": 2,
    }
