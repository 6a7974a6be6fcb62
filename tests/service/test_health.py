import asyncio

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from service.server import Server
from tests.service.conftest import QUICK
from tests.service.fakes import FakeDetector, request_for

SERVICE = "pathguard.v1.DetectionService"
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_a_warm_server_says_serving_for_itself_and_its_service(served, service):
    answer = await HealthStub(served.channel).Check(HealthCheckRequest(service=service))
    assert answer.status == SERVING


async def test_a_service_that_the_server_does_not_have_is_not_found(served):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await HealthStub(served.channel).Check(HealthCheckRequest(service="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watching_a_service_that_the_server_does_not_have_says_so_and_goes_on(served):
    stream = HealthStub(served.channel).Watch(HealthCheckRequest(service="other"))
    assert (await stream.read()).status == HealthCheckResponse.SERVICE_UNKNOWN
    assert not stream.done()
    stream.cancel()


async def test_two_watchers_see_warm_up_and_stop_and_one_leaving_early_harms_nobody():
    server = Server(FakeDetector(), QUICK)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = HealthStub(channel)
        leaving, *staying = [health.Watch(HealthCheckRequest(service=name)) for name in ("", "", SERVICE)]
        for stream in (leaving, *staying):
            assert (await stream.read()).status == NOT_SERVING
        leaving.cancel()

        await server.warm_up()
        for stream in staying:
            assert (await stream.read()).status == SERVING

        stopping = asyncio.create_task(server.stop())
        for stream in staying:
            assert (await stream.read()).status == NOT_SERVING
            assert await stream.read() is grpc.aio.EOF
        await stopping


async def test_health_and_calls_say_not_ready_until_the_model_is_warm():
    detector = FakeDetector()
    detector.gate.clear()
    server = Server(detector, QUICK)
    port = await server.start()
    warming = asyncio.create_task(server.warm_up())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert (await HealthStub(channel).Check(HealthCheckRequest())).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await DetectionServiceStub(channel).Detect(request_for(1))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "warming up" in caught.value.details()

        detector.gate.set()
        await warming
        assert (await HealthStub(channel).Check(HealthCheckRequest())).status == SERVING
    await server.stop()
