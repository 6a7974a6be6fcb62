import asyncio
import socket

import grpc
import pytest

from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from service.errors import AddressError
from service.listener import Listener, address
from service.server import Server
from tests.service.conftest import QUICK
from tests.service.fakes import FakeDetector, request_for
from tests.service.nameless import nameless_call
from tests.service.waiting import until


def restarts(server):
    return server._metrics.registry.get_sample_value("pathguard_server_restarts_total")


async def test_a_call_that_ends_grpcs_own_server_ends_neither_the_calls_under_way_nor_the_service(caplog, monkeypatch):
    monkeypatch.setattr("service.grpc_server._KNOWN", False)
    detector = FakeDetector()
    server = Server(detector, QUICK)
    port = await server.start()
    await server.warm_up()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = DetectionServiceStub(channel)
        detector.hold()
        under_way = asyncio.ensure_future(stub.Detect(request_for(1)))
        await detector.running()
        for times in range(1, 4):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(nameless_call())
                await until(lambda times=times: restarts(server) == times)
            await asyncio.sleep(0.1)
        detector.gate.set()
        assert (await under_way).results[0].score == 1.0
        assert (await stub.Detect(request_for(2), wait_for_ready=True)).results[0].score == 2.0
    await server.stop()


async def test_a_port_that_is_lost_is_told(monkeypatch):
    class Ended:
        async def wait_for_termination(self, seconds):
            raise UnicodeDecodeError("utf-8", b"", 0, 1, "x")

        def add_insecure_port(self, where):
            raise RuntimeError("taken")

    monkeypatch.setattr("service.listener._REBIND_SECONDS", 0.05)
    with pytest.raises(AddressError, match="expected a free port, got port 0 of 127.0.0.1, which is in use"):
        await Listener(Ended, lambda: None, "127.0.0.1", 0).watch()


def test_an_ipv6_address_stands_in_brackets():
    assert (address("::1", 5), address("127.0.0.1", 5)) == ("[::1]:5", "127.0.0.1:5")
