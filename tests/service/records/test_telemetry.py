import asyncio
import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest

from service.config import MetricsConfig
from service.errors import AddressError
from service.interceptors import ErrorWrapper, WrappingInterceptor
from service.records.telemetry import CallWrapper, Metrics, MetricsServer

ROOT = Path(__file__).parents[3]


async def answer(request, context):
    match request:
        case b"fail":
            raise RuntimeError("secret")
        case b"wait":
            await asyncio.sleep(30)
    return request


async def answer_each(requests, context):
    async for request in requests:
        yield await answer(request, context)


@pytest.fixture
async def counted():
    metrics = Metrics("1.2.3")
    server = grpc.aio.server(interceptors=[WrappingInterceptor(CallWrapper(metrics, log_calls=True), ErrorWrapper())])
    handlers = {
        "single": grpc.unary_unary_rpc_method_handler(answer),
        "talk": grpc.stream_stream_rpc_method_handler(answer_each),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield metrics.registry, channel
    await server.stop(None)


def value(registry, name, kind, method, **labels):
    return registry.get_sample_value(
        name, {"grpc_type": kind, "grpc_service": "a.Test", "grpc_method": method, **labels}
    )


async def test_calls_are_counted_under_the_usual_names_by_their_final_status(counted):
    registry, channel = counted
    single = channel.unary_unary("/a.Test/single")
    for request, timeout in ((b"fine", 10), (b"fail", 10), (b"wait", 0.05)):
        try:
            await single(request, timeout=timeout)
        except grpc.aio.AioRpcError:
            assert request != b"fine"
    await asyncio.sleep(0.05)

    assert value(registry, "grpc_server_started_total", "unary", "single") == 3
    for code in ("OK", "Internal", "Cancelled"):
        assert value(registry, "grpc_server_handled_total", "unary", "single", grpc_code=code) == 1
    assert value(registry, "grpc_server_handling_seconds_count", "unary", "single") == 3
    assert value(registry, "grpc_server_msg_sent_total", "unary", "single") == 1


async def test_messages_of_streams_are_counted_each(counted):
    registry, channel = counted
    answers = [part async for part in channel.stream_stream("/a.Test/talk")(iter([b"1", b"2", b"3"]))]
    assert answers == [b"1", b"2", b"3"]
    assert value(registry, "grpc_server_msg_received_total", "stream", "talk") == 3
    assert value(registry, "grpc_server_msg_sent_total", "stream", "talk") == 3
    assert value(registry, "grpc_server_handled_total", "stream", "talk", grpc_code="OK") == 1


@pytest.mark.parametrize("sent", ["order-17", None, "x" * 65, "two words"])
async def test_a_call_has_an_id_its_callers_if_it_is_a_sane_one(counted, sent, caplog):
    _, channel = counted
    call = channel.unary_unary("/a.Test/single")(b"x", metadata=(("x-request-id", sent),) if sent else ())
    await call
    told = dict(await call.trailing_metadata())["x-request-id"]
    if sent == "order-17":
        assert told == sent
    else:
        assert re.fullmatch("[0-9a-f]{16}", told)


def test_metrics_are_read_over_http_and_an_address_in_use_is_told():
    metrics = Metrics("1.2.3")
    server = MetricsServer(MetricsConfig(port=0), metrics.registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as response:
            text = response.read().decode()
        with pytest.raises(AddressError, match=rf"expected an address for metrics, got 127.0.0.1:{server.port}: "):
            MetricsServer(MetricsConfig(port=server.port), metrics.registry)
    finally:
        server.close()
    assert 'pathguard_build_info{version="1.2.3"} 1.0' in text


def test_a_probe_without_grpc_asks_over_http():
    healthy = []
    server = MetricsServer(MetricsConfig(port=0), Metrics("1").registry, lambda: bool(healthy))
    url = f"http://127.0.0.1:{server.port}/healthz"
    try:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url, timeout=10)
        caught.value.close()
        healthy.append(True)
        with urllib.request.urlopen(url, timeout=10) as response:
            assert response.read() == b"SERVING\n"
    finally:
        server.close()
    assert caught.value.code == 503


def test_a_spread_of_many_values_reads_like_any_histogram():
    metrics = Metrics("1")
    metrics.p_values.observe("shoes", [0.001, 0.04, 0.05, 1.0])
    metrics.p_values.observe("shoes", [0.5])
    read = metrics.registry.get_sample_value
    assert read("pathguard_p_value_bucket", {"model": "shoes", "le": "0.05"}) == 3
    assert read("pathguard_p_value_bucket", {"model": "shoes", "le": "+Inf"}) == 5
    assert read("pathguard_p_value_sum", {"model": "shoes"}) == pytest.approx(1.591)


@pytest.mark.parametrize("file", ["deploy/grafana/dashboards/pathguard.json", "deploy/prometheus/rules.yml"])
def test_dashboard_and_rules_name_only_metrics_that_there_are(file):
    text = (ROOT / file).read_text()
    if file.endswith(".json"):
        text = " ".join(target["expr"] for panel in json.loads(text)["panels"] for target in panel.get("targets", ()))
    named = set(re.findall(r"\b(?:pathguard|grpc_server|process)_[a-z_]+", text))
    families = {family.name for family in Metrics("1").registry.collect()}
    assert named
    assert {re.sub("_(total|bucket|sum|count)$", "", name) for name in named} <= families
