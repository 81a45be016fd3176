"""`/metrics`: one catalogue behind the text, the page and the dashboard; figures agree with the report."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_router_core import request

from kvrelay import LLM
from kvrelay.config import EngineConfig
from kvrelay.energy import EnergyReport, WorkerEnergy
from kvrelay.errors import DeadlineExceeded, LeaseExpired, WorkerFailed
from kvrelay.metrics import METRICS, MetricRegistry
from kvrelay.metrics.catalogue import PREFIX
from kvrelay.metrics.documents import grafana_dashboard, metrics_page
from kvrelay.router.core import Router
from kvrelay.router.policies import open_policy
from kvrelay.router.request import Update
from kvrelay.router.telemetry import Telemetry
from kvrelay.sparse import AttentionUse
from kvrelay.types import WorkerId
from kvrelay.wire import Heartbeat, StepReport
from tiny_engine import greedy, hello, prompts, tiny_llm

ROOT = Path(__file__).resolve().parents[2]


def families(text: bytes) -> dict[str, Any]:
    """Families by the name they were declared with; the parser drops `_total` from counters."""
    found = list(text_string_to_metric_families(text.decode()))
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in found}


def value(text: bytes, sample: str, **labels: str) -> float:
    """The one sample of that name whose labels include these."""
    values = [
        s.value
        for family in families(text).values()
        for s in family.samples
        if s.name == sample and labels.items() <= s.labels.items()
    ]
    assert len(values) == 1, (sample, labels, values)
    return float(values[0])


def telemetry(**settings: Any) -> Telemetry:
    """Over a router with one worker of each role; nothing has happened yet."""
    router = Router(open_policy("least_loaded"), lambda to, what: None, lambda update: None)
    router.fleet.add(hello("p0", "prefill"), 64, 512)
    router.fleet.add(hello("d0", "decode"), 64, 512)
    return Telemetry(EngineConfig.of(model="/models/m", **settings), router)


def fed(**settings: Any) -> tuple[Telemetry, EnergyReport]:
    """Everything that can happen has happened once."""
    settings = {"slo_ttft_s": 1.0, "slo_itl_s": 0.5, "price_per_hour": 3.6, "pue": 1.5} | settings
    told = telemetry(carbon_g_per_kwh=100.0, **settings)
    router = told._router
    for worker_id in ("p0", "d0"):
        for phase in ("prefill", "transfer", "decode"):
            step = StepReport(
                worker_id=WorkerId(worker_id),
                phase=phase,  # type: ignore[arg-type]
                start_s=1.0,
                end_s=3.0,
                cpu_s=0.0,
                num_tokens={"r0": 10},
                moved_bytes={"r0": 640} if phase == "transfer" else {},
            )
            router.fleet.add_step(step)
        router.workers[WorkerId(worker_id)].heartbeat = Heartbeat(
            worker_id=WorkerId(worker_id),
            at_s=1.0,
            num_free_blocks=48,
            num_blocks=64,
            num_running=0,
            num_waiting=0,
            num_tickets=0,
            peak_blocks=20,
            counters={
                "prefix_cache_queries": 100,
                "prefix_cache_hits": 25,
                "tier_hits_disk": 4,
                "kv_stalls": 3,
            },
        )
    told.on_handshake(0.01)
    told.on_role_change("done")
    told.on_attempt_failed(LeaseExpired("silent"))
    for number, gap_s in ((0, 0.1), (1, 2.0)):
        routed = request(number)
        router.counts.arrived(routed, 0.0)
        routed.attention["decode"] = AttentionUse(num_queries=1, attended_pairs=10, causal_pairs=80)
        told.on_reserved(routed, 0.01)
        for at_s, event in enumerate(("arrived", "prefill_started", "prefill_finished", "kv_committed")):
            routed.ledger.add(event, at_s / 10)
        for index in range(3):
            routed.ledger.token(0.4 + index * gap_s)
            routed.token_ids.append(1)
            router.counts.num_output_tokens += 1
            told.on_token(routed)
        update = Update(request_id=routed.request_id, finish_reason="stop", at_s=0.4 + 2 * gap_s)
        router.counts.ended(routed, update)
        told.on_end(routed, update)
    failure = Update(request_id=routed.request_id, error=DeadlineExceeded("late"), at_s=9.0)
    router.counts.ended(routed, failure)
    told.on_end(routed, failure)
    each = WorkerEnergy(prefill_j=10.0, transfer_j=2.0, decode_j=20.0, idle_j=None)
    energy = EnergyReport(
        source="model(idle_w=1,busy_w=2)",
        prefill_j=20.0,
        transfer_j=4.0,
        decode_j=40.0,
        idle_j=36.0,
        gross_j=100.0,
        net_j=64.0,
        window_s=10.0,
        workers={"p0": each, "d0": each},
    )
    return told, energy


def test_everything_that_can_be_shown_is_in_the_catalogue_and_back() -> None:
    told, energy = fed()
    shown = {name.removeprefix(PREFIX) for name in families(told.render(energy, 10.0))}
    assert shown == set(METRICS)


def test_kinds_labels_and_help_are_the_catalogues() -> None:
    told, energy = fed()
    for name, family in families(told.render(energy, 10.0)).items():
        metric = METRICS[name.removeprefix(PREFIX)]
        assert family.type == metric.kind
        assert family.documentation == metric.help
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == {"model_name", *metric.labels}
            assert sample.labels["model_name"] == "m"


def test_the_alias_shows_vllms_metrics_twice_with_equal_values_and_no_others() -> None:
    told, energy = fed(metrics_alias="vllm", served_model_name="served")
    found = families(told.render(energy, 10.0))
    alias = {name.removeprefix("vllm:") for name in found if name.startswith("vllm:")}
    assert alias == {metric.name for metric in METRICS.values() if metric.vllm}
    for name in alias:
        mine, theirs = found[PREFIX + name].samples, found["vllm:" + name].samples
        assert [s.value for s in mine] == [s.value for s in theirs]
        assert all(s.labels["engine"] == "0" and s.labels["model_name"] == "served" for s in theirs)


def test_what_is_unknown_is_absent() -> None:
    told = telemetry()
    text = told.render(EnergyReport(source=None), 1.0)
    shown = {name.removeprefix(PREFIX) for name in families(text)}
    absent = (
        "energy",
        "joule",
        "watts",
        "slo_",
        "goodput",
        "cost",
        "carbon",
        "prefix_cache",
        "tier",
        "sparse",
    )
    assert not [name for name in shown if any(word in name for word in absent)]
    assert "kv_cache_usage_perc" not in shown, "no heartbeat yet"
    assert value(text, "kvrelay:num_requests_waiting") == 0.0


def test_figures_are_those_that_were_fed() -> None:
    told, energy = fed()
    text = told.render(energy, 10.0)
    source = {"source": "model(idle_w=1,busy_w=2)"}
    assert value(text, "kvrelay:slo_attainment_ratio") == pytest.approx(1 / 3)
    assert told.slo() == (1, 2), "what the page shows is of the same requests"
    assert value(text, "kvrelay:slo_requests_total", outcome="missed") == 1.0
    assert value(text, "kvrelay:goodput_requests_per_joule", **source) == pytest.approx(0.01)
    assert value(text, "kvrelay:output_tokens_per_joule", **source) == pytest.approx(0.06)
    assert value(text, "kvrelay:energy_per_output_token_joules", **source) == pytest.approx(100 / 6)
    assert value(text, "kvrelay:energy_joules_total", role="prefill", phase="decode") == 20.0
    assert value(text, "kvrelay:energy_joules_total", role="shared", phase="idle") == 36.0
    assert value(text, "kvrelay:energy_facility_joules_total") == pytest.approx(150.0)
    assert value(text, "kvrelay:carbon_grams_total") == pytest.approx(150 / 3.6e6 * 100)
    assert value(text, "kvrelay:tokens_per_joule", phase="decode", **source) == pytest.approx(0.5)
    assert value(text, "kvrelay:average_power_watts", **source) == pytest.approx(10.0)
    window_s = 9.0
    assert value(text, "kvrelay:cost_per_million_tokens", tokens="output") == pytest.approx(
        3.6 / 3600 * window_s / 6 * 1e6
    )
    assert value(text, "kvrelay:time_to_first_token_seconds_sum") == pytest.approx(0.8)
    assert value(text, "kvrelay:inter_token_latency_seconds_bucket", le="0.15") == 2.0
    for name in ("generation_tokens", "max_num_generation_tokens"):
        assert value(text, f"kvrelay:request_{name}_sum") == 6.0, "two answers of three"
    assert value(text, "kvrelay:request_params_max_tokens_sum") == 2 * request(0).params.max_tokens
    assert value(text, "kvrelay:kv_cache_usage_perc") == 0.25
    assert value(text, "kvrelay:prefix_cache_hits_total") == 50.0
    assert value(text, "kvrelay:kv_transfer_stalls_total") == 6.0
    assert value(text, "kvrelay:sparse_attention_density", phase="decode") == 0.125
    assert value(text, "kvrelay:kv_transfer_expired_total") == 1.0


def test_counters_never_go_down_and_joules_follow_the_role() -> None:
    told, energy = fed()
    told.render(energy, 10.0)
    told._router.fleet.loads[WorkerId("p0")].role = "decode"
    later = WorkerEnergy(prefill_j=9.0, transfer_j=2.0, decode_j=27.0)  # a provisional share moved
    report = EnergyReport(source=energy.source, gross_j=99.0, net_j=64.0, workers={"p0": later})
    text = told.render(report, 11.0)
    assert value(text, "kvrelay:energy_gross_joules_total") == 100.0
    assert value(text, "kvrelay:energy_joules_total", role="prefill", phase="prefill") == 10.0
    assert value(text, "kvrelay:energy_joules_total", role="decode", phase="decode") == 20.0 + 7.0


def test_a_name_or_label_that_is_not_in_the_catalogue_is_a_bug() -> None:
    registry = MetricRegistry("m")
    with pytest.raises(KeyError):
        registry.set("num_requests_runing", 1)
    with pytest.raises(AssertionError, match="is a gauge"):
        registry.add("num_requests_running", 1)
    with pytest.raises(AssertionError, match="labels"):
        registry.add("request_success_total", 1)
    with pytest.raises(AssertionError, match="go down"):
        registry.add("request_success_total", -1, "stop")


def test_a_failure_is_counted_by_its_class() -> None:
    told = telemetry()
    told.on_end(request(0), Update(request_id=request(0).request_id, error=WorkerFailed("x"), at_s=1.0))
    assert value(told.registry.render(), "kvrelay:request_failure_total", error="WorkerFailed") == 1.0


def test_the_page_and_the_dashboard_are_the_catalogues() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_page(), "run scripts/metrics_documents.py"
    dashboard = json.loads((ROOT / "grafana" / "kvrelay.json").read_text())
    assert dashboard == grafana_dashboard(), "run scripts/metrics_documents.py"


def test_the_dashboard_asks_for_every_metric_and_for_none_that_is_not_exported() -> None:
    told, energy = fed()
    exported = {sample.name for f in families(told.render(energy, 10.0)).values() for sample in f.samples}
    panels = [panel for panel in grafana_dashboard()["panels"] if panel["type"] != "row"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"kvrelay:\w+", target["expr"])
    }
    assert asked <= exported
    assert {re.sub("_bucket$", "", name).removeprefix(PREFIX) for name in asked} == set(METRICS)
    assert len({panel["id"] for panel in grafana_dashboard()["panels"]}) == len(panels) + 7


def test_a_running_engine_agrees_with_its_own_report(tiny_directory: Path) -> None:
    settings = {"power_model": "idle_w=5,busy_w=20", "slo_ttft_s": 60.0, "metrics_alias": "vllm"}
    with tiny_llm(tiny_directory, **settings) as llm:
        outputs = llm.generate(prompts(70, 130, 20), greedy(8))
        time.sleep(0.3)  # the last heartbeats
        text = llm.engine.metrics()
        check_against_outputs(llm, text, outputs)


def check_against_outputs(llm: LLM, text: bytes, outputs: list[Any]) -> None:
    report = llm.report()
    assert value(text, "kvrelay:prompt_tokens_total") == 220
    assert value(text, "vllm:generation_tokens_total") == report.num_output_tokens == 24
    assert value(text, "kvrelay:request_success_total", finished_reason="length") == 3
    assert value(text, "kvrelay:time_to_first_token_seconds_count") == 3
    ttft_s = sum(output.timings.ttft_s for output in outputs)
    assert value(text, "kvrelay:time_to_first_token_seconds_sum") == pytest.approx(ttft_s)
    gaps_s = sum(sum(output.timings.itl_s) for output in outputs)
    assert value(text, "kvrelay:inter_token_latency_seconds_sum") == pytest.approx(gaps_s)
    assert value(text, "kvrelay:inter_token_latency_seconds_count") == 21
    moved = sum(
        s.value
        for s in families(text)["kvrelay:kv_transfer_bytes_total"].samples
        if s.name == "kvrelay:kv_transfer_bytes_total"
    )
    assert moved == report.kv_bytes_moved
    assert value(text, "kvrelay:kv_transfer_handshake_seconds_count") == 1
    assert value(text, "kvrelay:slo_attainment_ratio") == 1.0
    parts = families(text)["kvrelay:energy_joules_total"].samples
    gross_j = value(text, "kvrelay:energy_gross_joules_total")
    assert sum(s.value for s in parts) == pytest.approx(gross_j, rel=0.01)
    assert all(s.labels["source"] == report.energy_source for s in parts)


def test_two_engines_in_one_process_do_not_share_metrics(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory) as one, tiny_llm(tiny_directory, mode="colocated") as other:
        one.generate(prompts(20), greedy(4))
        assert value(one.engine.metrics(), "kvrelay:generation_tokens_total") == 4
        assert value(other.engine.metrics(), "kvrelay:generation_tokens_total") == 0
