import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.interceptors import ErrorWrapper, WrappingInterceptor
from service.records.telemetry import CallWrapper, Metrics
from service.records.tracing import TraceWrapper
from tests.service.waiting import until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def answer(request, context):
    if request == b"fail":
        raise RuntimeError("secret")
    return request


async def answer_each(requests, context):
    async for request in requests:
        yield await answer(request, context)


@pytest.fixture
async def traced():
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    wrappers = [CallWrapper(Metrics("1"), log_calls=False), TraceWrapper(provider), ErrorWrapper()]
    server = grpc.aio.server(interceptors=[WrappingInterceptor(*wrappers)])
    handlers = {
        "single": grpc.unary_unary_rpc_method_handler(answer),
        "talk": grpc.stream_stream_rpc_method_handler(answer_each),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield exporter, channel
    await server.stop(None)
    wrappers[1].close()


async def test_a_call_is_a_span_of_the_callers_trace_with_status_and_id_and_nothing_that_was_sent(traced):
    exporter, channel = traced
    single = channel.unary_unary("/a.Test/single")
    assert await single(b"pixels", metadata=(("traceparent", PARENT), ("x-request-id", "order-17"))) == b"pixels"
    await until(exporter.get_finished_spans)
    (span,) = exporter.get_finished_spans()
    assert (span.name, f"{span.context.trace_id:032x}") == ("a.Test/single", PARENT.split("-")[1])
    assert dict(span.attributes) == {
        "rpc.system": "grpc",
        "rpc.service": "a.Test",
        "rpc.method": "single",
        "rpc.grpc.status_code": 0,
        "pathguard.request_id": "order-17",
    }
    assert "pixels" not in span.to_json()


@pytest.mark.parametrize("kind", ["single", "talk"])
async def test_a_failed_call_is_a_failed_span(traced, kind):
    exporter, channel = traced
    single, talk = channel.unary_unary("/a.Test/single"), channel.stream_stream("/a.Test/talk")
    with pytest.raises(grpc.aio.AioRpcError):
        await (single(b"fail") if kind == "single" else talk(iter([b"fail"])).read())
    await until(exporter.get_finished_spans)
    (span,) = exporter.get_finished_spans()
    assert (span.attributes["rpc.grpc.status_code"], span.status.is_ok) == (13, False)
    assert "secret" not in span.to_json()
