"""OpenTelemetry spans, one a call, with its stages as children. Nothing of the SDK is imported while no endpoint is set."""

from __future__ import annotations

import os
import time
from typing import Any

from server.config import TelemetryConfig
from server.core import Timings

_STAGES = ("tokenize", "queue", "run", "post")


def make_tracer(config: TelemetryConfig) -> Tracer | None:
    """None where neither the configuration nor OTEL_EXPORTER_OTLP_ENDPOINT names an endpoint."""
    endpoint = config.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    return Tracer(config, endpoint) if endpoint else None


class Tracer:
    """Makes and ends spans; exports them in batches from a thread of the SDK."""

    def __init__(self, config: TelemetryConfig, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": config.service_name}), sampler=ParentBasedTraceIdRatio(config.sample_ratio)
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=config.otlp_insecure)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("understudy")

    def start(self, method: str, traceparent: str) -> Any:
        """A server span for `method`, a child of the caller's where it sent a W3C traceparent."""
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract({"traceparent": traceparent}) if traceparent else None
        service, _, name = method.lstrip("/").partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        return self._tracer.start_span(f"{service}/{name}", context=parent, kind=SpanKind.SERVER, attributes=attributes)

    def end(self, span: Any, code: str, timings: Timings, attributes: dict[str, str | int]) -> None:
        """Ends a call's span. Stages become child spans, laid end to end before now: their lengths are measured, their starts are not."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        if span.is_recording():
            lengths = [(name, int(getattr(timings, name) * 1e9)) for name in _STAGES]
            start = time.time_ns() - sum(length for _, length in lengths)
            for name, length in lengths:
                if length:
                    child = self._tracer.start_span(name, context=set_span_in_context(span), start_time=start)
                    start += length
                    child.end(end_time=start)
            span.set_attributes({"rpc.grpc.status": code, **attributes})
            if code != "OK":
                span.set_status(Status(StatusCode.ERROR, code))
        span.end()

    def close(self) -> None:
        """Exports what waits, for a few seconds at most."""
        self._provider.shutdown()
