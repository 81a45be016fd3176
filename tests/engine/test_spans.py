"""One span per request, from its ledger, under its caller's span; nothing of the text, nothing global."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_router_core import request

from kvrelay.config import EngineConfig
from kvrelay.errors import DeadlineExceeded, InvalidConfig, InvalidRequest
from kvrelay.outputs import StreamEvent
from kvrelay.router.request import Operation, Update
from kvrelay.router.spans import Spans, open_spans
from tiny_engine import greedy, prompts, tiny_llm

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


def spans_into(exporter: Any) -> Spans:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    return Spans(SimpleSpanProcessor(exporter), "tiny")


@pytest.fixture
def exporter() -> Any:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


@pytest.mark.parametrize("operation", ["text_completion", "chat"])
def test_a_span_is_the_requests_ledger(exporter: Any, operation: Operation) -> None:
    routed = request(0, num_prompt_tokens=5, max_tokens=3)
    routed.operation = operation
    routed.traceparent, routed.last_pair, routed.attempt = TRACEPARENT, ("p0", "d0"), 1  # type: ignore[assignment]
    for at_s, event in ((10.0, "arrived"), (11.0, "prefill_started"), (13.0, "prefill_finished")):
        routed.ledger.add(event, at_s)
    routed.ledger.token(14.0)
    routed.token_ids.append(7)
    spans_into(exporter).on_end(routed, Update(request_id=routed.request_id, finish_reason="stop", at_s=15.0))
    (span,) = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert span.end_time - span.start_time == 5_000_000_000
    assert [(e.name, (e.timestamp - span.start_time) / 1e9) for e in span.events] == [
        ("arrived", 0.0),
        ("prefill_started", 1.0),
        ("prefill_finished", 3.0),
        ("first_token", 4.0),
    ]
    found = dict(span.attributes)
    assert (found["gen_ai.operation.name"], span.name) == (routed.operation, f"{routed.operation} tiny")
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (5, 1)
    assert found["gen_ai.response.finish_reasons"] == ("stop",)
    assert (found["gen_ai.latency.time_to_first_token"], found["gen_ai.latency.time_in_queue"]) == (4.0, 1.0)
    assert (found["kvrelay.prefill_worker"], found["kvrelay.decode_worker"]) == ("p0", "d0")


@pytest.mark.parametrize("traceparent", [None, "nonsense", "00-zz-zz-01"])
def test_without_a_sound_parent_the_span_is_a_root(exporter: Any, traceparent: str | None) -> None:
    routed = request(0)
    routed.traceparent = traceparent
    routed.ledger.add("arrived", 1.0)
    error = DeadlineExceeded("too late")
    spans_into(exporter).on_end(routed, Update(request_id=routed.request_id, error=error, at_s=2.0))
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    assert span.attributes["error.type"] == "DeadlineExceeded"
    assert span.status.status_code.name == "ERROR"


def test_an_engine_sends_one_span_for_each_request(
    tiny_directory: Path, exporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrelay.router.control.open_spans", lambda endpoint, name: spans_into(exporter))
    events: list[StreamEvent] = []
    with tiny_llm(tiny_directory, otel_endpoint="http://127.0.0.1:9/v1/traces") as llm:
        llm.generate(prompts(20, 70), greedy(4))
        prepared = llm.engine.prepare(prompts(20)[0], greedy(4))
        llm.engine.submit(replace(prepared, traceparent=TRACEPARENT), events.append)
        llm.generate(prompts(20), greedy(4))
    found = exporter.get_finished_spans()
    assert len(found) == 4
    assert sum(f"{span.context.trace_id:032x}" == TRACE for span in found) == 1
    assert all(len(span.events) >= 5 for span in found)
    text = str([dict(span.attributes) for span in found])
    assert "prompt" not in text
    assert "completion.content" not in text


def test_the_extra_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InvalidConfig, match=r"kvrelay\[otel\]"):
        open_spans("http://localhost:4318/v1/traces", "m")
    assert EngineConfig.of(model="m").otel_endpoint is None


def test_a_requests_own_queue_timeout(tiny_directory: Path) -> None:
    ended: list[StreamEvent] = []
    with tiny_llm(tiny_directory, max_num_seqs=1, queue_timeout_s=60.0) as llm:
        prepared = llm.engine.prepare(prompts(20)[0], greedy(800))
        for timeout_s in (None, None, 0.05):
            llm.engine.submit(replace(prepared, queue_timeout_s=timeout_s), ended.append)
        llm.generate(prompts(20), greedy(4))
        with pytest.raises(InvalidRequest, match="queue_timeout_s=-1"):
            llm.engine.submit(replace(prepared, queue_timeout_s=-1), ended.append)
    errors = [event.error for event in ended if event.error is not None]
    assert [type(error) for error in errors] == [DeadlineExceeded]
