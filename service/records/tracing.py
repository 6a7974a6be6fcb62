"""OpenTelemetry traces, one span for each RPC; the extra `otel` brings the libraries.

Where they go is said by the usual variables, such as `OTEL_EXPORTER_OTLP_ENDPOINT`; a caller's `traceparent` is gone on
with. A span holds the method, the status and the request's id, and nothing of what was sent. OpenTelemetry's own
instrumentation of gRPC would do the same, but goes around handlers in a way that hides aborts from `service.errors`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from service.errors import ConfigError
from service.interceptors import Context, Single, Stream, code_of
from service.records.logs import SERVICE, request_id

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_CLOSE_MILLISECONDS: Final = 2000
_CANCELLED: Final = 1


def otlp_provider(version: str) -> "TracerProvider":
    """Sends spans by OTLP over gRPC, in the background.

    Raises:
        ConfigError: the libraries are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigError(f"expected the package {error.name} for traces, got none; install pathguard[otel]") from None
    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE, "service.version": version}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class TraceWrapper:
    """Gives each RPC a span. Goes around errors, so that it sees the final status."""

    def __init__(self, provider: "TracerProvider") -> None:
        """Spans go to `provider`, which `close` shuts down."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("pathguard")
        self._propagator = TraceContextTextMapPropagator()

    def single(self, method: str, behaviour: Single) -> Single:
        """Goes around a handler that answers once."""

        async def traced(request: Any, context: Context) -> Any:
            with self._span(method, context):
                return await behaviour(request, context)

        return traced

    def stream(self, method: str, behaviour: Stream) -> Stream:
        """Goes around a handler that answers with a stream."""

        async def traced(request: Any, context: Context) -> AsyncIterator[Any]:
            with self._span(method, context):
                async for response in behaviour(request, context):
                    yield response

        return traced

    def close(self) -> None:
        """Sends what is left, for some seconds."""
        self._provider.force_flush(_CLOSE_MILLISECONDS)
        self._provider.shutdown()

    @contextmanager
    def _span(self, method: str, context: Context) -> Iterator[None]:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        service, _, name = method.lstrip("/").rpartition("/")
        carrier = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        span = self._tracer.start_span(
            method.lstrip("/"),
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": name,
                "pathguard.request_id": request_id(),
            },
        )
        code = 0
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = _CANCELLED
            raise
        except BaseException:
            code = code_of(context)
            raise
        finally:
            span.set_attribute("rpc.grpc.status_code", code)
            if code in _SERVERS_FAULT:
                span.set_status(Status(StatusCode.ERROR))
            span.end()


# UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS, as OpenTelemetry's convention has it.
_SERVERS_FAULT: Final = frozenset({2, 4, 12, 13, 14, 15})
