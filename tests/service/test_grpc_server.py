import asyncio

import grpc
import pytest

from service.server import Server
from tests.service.conftest import QUICK
from tests.service.fakes import FakeDetector
from tests.service.nameless import nameless_call

# gRPC's code for UNIMPLEMENTED, as it stands in a trailer.
TOLD = b"grpc-status\x0212"


async def test_a_call_whose_method_is_no_text_is_told_that_there_is_none_and_ends_nothing():
    server = Server(FakeDetector(), QUICK)
    port = await server.start()
    await server.warm_up()
    for _ in range(3):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(nameless_call())
        said = b""
        while TOLD not in said:
            said += await asyncio.wait_for(reader.read(1000), 10)
        writer.close()
    assert server._metrics.registry.get_sample_value("pathguard_server_restarts_total") == 0
    await server.stop()


async def test_many_calls_of_methods_that_there_are_not_are_all_told_so():
    server = Server(FakeDetector(), QUICK)
    port = await server.start()
    await server.warm_up()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        calls = [channel.unary_unary(f"/no.Service/No{number}")(b"", timeout=10) for number in range(100)]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await server.stop()
