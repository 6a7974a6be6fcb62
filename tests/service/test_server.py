import asyncio
import signal
import socket
import sys
import threading
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from detector.images import ImageSpec, encode_png
from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from service.config import ServiceConfig
from service.errors import AddressError, ConfigError
from service.server import Server, running_server, serving
from tests.service.conftest import QUICK
from tests.service.fakes import POISON, FakeDetector, image_of, request_for


@asynccontextmanager
async def process(*settings):
    """A server in a process of its own, and its target; killed if it is still there at the end."""
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.service.serve_fake", *settings, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield started, (await started.stdout.readline()).decode().rpartition(" ")[2].strip()
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


async def services_of(channel):
    requests = iter([ServerReflectionRequest(list_services="")])
    responses = [response async for response in ServerReflectionStub(channel).ServerReflectionInfo(requests)]
    return {service.name for service in responses[0].list_services_response.service}


async def test_reflection_lists_the_services(served):
    assert await services_of(served.channel) == {
        "pathguard.v1.DetectionService",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_explanations_keep_no_file_from_being_decoded():
    class Slow(FakeDetector):
        explaining, finish = threading.Event(), threading.Event()

        def explainer(self):
            self.explaining.set()
            assert self.finish.wait(20)
            return super().explainer()

    detector = Slow()
    asking, files = request_for(1), [pb.Image(encoded=encode_png(image_of(value))) for value in (1, 2, 3)]
    asking.explain = True
    config = replace(QUICK, decode_threads=1)
    async with serving(detector, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = DetectionServiceStub(channel)
        explained = stub.Detect(asking)
        try:
            assert await asyncio.to_thread(detector.explaining.wait, 20)
            decoded = await stub.Detect(pb.DetectRequest(images=files), timeout=10)
        finally:
            detector.finish.set()
        assert [result.label for result in decoded.results] == [1, 2, 0]
        with pytest.raises(grpc.aio.AioRpcError):  # it has no statistics of paths
            await explained


async def test_reflection_can_be_switched_off():
    config = ServiceConfig(port=0, reflection=False, notice_seconds=0.0)
    async with serving(FakeDetector(), config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services_of(channel)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_port_in_use_gives_one_line_that_names_it(capfd):
    async with serving(FakeDetector(), QUICK) as port:
        with pytest.raises(AddressError) as caught:
            async with serving(FakeDetector(), ServiceConfig(port=port)):
                pass
    message = f"expected a free port, got port {port} of 127.0.0.1, which is in use by another program"
    assert str(caught.value) == message
    assert capfd.readouterr().err == ""


async def test_an_address_of_another_machine_is_named():
    config = ServiceConfig(host="192.0.2.1", port=0, allow_insecure=True)
    with pytest.raises(AddressError, match=r"got 192\.0\.2\.1:0: "):
        async with serving(FakeDetector(), config):
            pass


async def test_a_largest_request_that_would_never_fit_is_found_at_the_start():
    with pytest.raises(ConfigError, match=r"max_pending_bytes of at least 1073741824 for 1024 images of 1024 x 1024 g"):
        Server(FakeDetector(ImageSpec(1024, 1024, 1)), ServiceConfig())


async def test_a_model_that_fails_at_warm_up_never_serves():
    class Broken(FakeDetector):
        def detect(self, pixels):
            raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match="no such layer"):
        async with serving(Broken(), QUICK):
            pass


async def test_calls_taken_before_the_stop_are_answered_and_later_ones_told_to_try_elsewhere():
    detector = FakeDetector()
    server = Server(detector, QUICK)
    port = await server.start()
    await server.warm_up()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = DetectionServiceStub(channel)
        detector.hold()
        taken = asyncio.ensure_future(stub.Detect(request_for(1)))
        await detector.running()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Detect(request_for(2))
        detector.gate.set()
        assert (await taken).results[0].score == 1.0
        await stopping
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the server is stopping, try again"


async def test_a_model_that_hangs_does_not_keep_the_server_from_stopping():
    detector = FakeDetector()
    server = Server(detector, ServiceConfig(port=0, notice_seconds=0.0, drain_seconds=0.05))
    port = await server.start()
    await server.warm_up()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        detector.hold()
        hanging = asyncio.ensure_future(DetectionServiceStub(channel).Detect(request_for(1)))
        await detector.running()
        await server.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await hanging
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    detector.gate.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_accepted_calls_end_and_then_the_process(number):
    async with process() as (server, target), grpc.aio.insecure_channel(target) as channel:
        stub = DetectionServiceStub(channel)
        calls = [asyncio.ensure_future(stub.Detect(request_for(n, n + 1))) for n in range(2)]
        assert await server.stdout.readline() == b"running\n"
        server.send_signal(number)
        answers = await asyncio.gather(*calls)
        assert [[result.score for result in answer.results] for answer in answers] == [[0.0, 1.0], [1.0, 2.0]]
        assert (await server.stdout.read()).endswith(f"stopped {server.pid}\n".encode())
        assert await server.wait() == 0


def test_a_server_runs_in_a_thread_of_a_program_without_a_loop():
    with running_server(FakeDetector(), QUICK) as target, grpc.insecure_channel(target) as channel:
        assert DetectionServiceStub(channel).Detect(request_for(5)).results[0].score == 5.0


def test_a_server_in_a_thread_that_cannot_start_says_why():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServiceConfig(port=taken.getsockname()[1])
        with pytest.raises(AddressError), running_server(FakeDetector(), config):
            pass


def test_a_call_that_fails_in_the_model_leaves_no_text_of_it_on_the_wire():
    with running_server(FakeDetector(), QUICK) as target, grpc.insecure_channel(target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            DetectionServiceStub(channel).Detect(request_for(POISON))
        assert "secret" not in str(caught.value) + str(caught.value.trailing_metadata())
