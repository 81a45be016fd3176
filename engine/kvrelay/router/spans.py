"""One OpenTelemetry span per request, from its ledger, with the GenAI semantic conventions.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/ ; latencies under the names that vLLM uses.
Needs the extra `otel`; without it nothing here is imported. Prompts and texts are never recorded.
"""

import time
from typing import TYPE_CHECKING, Any

from kvrelay.errors import InvalidConfig
from kvrelay.router.request import RoutedRequest, Update

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor


def open_spans(endpoint: str, model_name: str) -> "Spans":
    """Spans sent to an OTLP/HTTP collector, such as `http://localhost:4318/v1/traces`.

    Raises `InvalidConfig` when the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidConfig(
            f"otel_endpoint={endpoint!r} needs the extra: pip install 'kvrelay[otel]' ({error})"
        ) from error
    return Spans(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)), model_name)


class Spans:
    """Turns requests that ended into spans for `processor`. Its tracer provider is its own, never global."""

    def __init__(self, processor: "SpanProcessor", model_name: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        self._provider = TracerProvider(resource=Resource.create({"service.name": "kvrelay"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("kvrelay")
        self._model_name = model_name
        self._epoch_ns = time.time_ns() - time.monotonic_ns()  # the ledger is on the monotonic clock

    def on_end(self, request: RoutedRequest, update: Update) -> None:
        """Record the whole life of a request, under its caller's span where `traceparent` names one."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": request.traceparent} if request.traceparent else {}
        span = self._tracer.start_span(
            f"{request.operation} {self._model_name}",
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes=self._attributes(request, update),
            start_time=self._at_ns(request.ledger.arrived_s),
        )
        for at_s, event in sorted(request.ledger.events):
            span.add_event(event, timestamp=self._at_ns(at_s))
        if update.error is not None:
            span.set_attribute("error.type", type(update.error).__name__)
            span.set_status(Status(StatusCode.ERROR, str(update.error)))
        span.end(end_time=self._at_ns(update.at_s))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _at_ns(self, at_s: float) -> int:
        return self._epoch_ns + int(at_s * 1e9)

    def _attributes(self, request: RoutedRequest, update: Update) -> dict[str, Any]:
        timings, params = request.ledger.timings(update.at_s), request.params
        found = {
            "gen_ai.operation.name": request.operation,
            "gen_ai.provider.name": "kvrelay",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.id": request.request_id,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.seed": request.seed,
            "gen_ai.usage.input_tokens": request.num_prompt_tokens,
            "gen_ai.usage.output_tokens": len(request.token_ids) - request.num_prompt_tokens,
            "gen_ai.response.finish_reasons": [update.finish_reason] if update.finish_reason else None,
            "gen_ai.latency.time_to_first_token": timings.ttft_s,
            "gen_ai.latency.e2e": timings.e2e_s,
            "gen_ai.latency.time_in_queue": timings.queue_s,
            "gen_ai.latency.time_in_model_prefill": timings.prefill_s,
            "gen_ai.latency.time_in_model_decode": timings.first_decode_s + timings.decode_s,
            "kvrelay.transfer_wait_s": timings.transfer_wait_s,
            "kvrelay.attempts": request.attempt,
            "kvrelay.prefill_worker": request.last_pair[0] if request.last_pair else None,
            "kvrelay.decode_worker": request.last_pair[1] if request.last_pair else None,
        }
        return {name: value for name, value in found.items() if value is not None}
