"""The cases of gRPC's interoperability tests that apply to a server with an interface of its own.

https://github.com/grpc/grpc/blob/master/doc/interop-test-descriptions.md
"""

import asyncio

import grpc
import pytest

from protos.pathguard.v1 import detection_pb2 as pb
from tests.service.fakes import CLASSES, message_of, request_for
from tests.service.test_servicer import refusal


async def test_empty_unary(served):
    """A request without content is answered."""
    assert len((await served.stub.ListModels(pb.ListModelsRequest())).models) == 1


async def test_large_unary(served):
    """A request of some 300 kB gets an answer of some 300 kB."""
    request = pb.DetectRequest(images=[message_of(value % 200) for value in range(1024)], include_path=True)
    for image in request.images:
        image.id = "x" * 300
    assert request.ByteSize() > 271_828
    response = await served.stub.Detect(request)
    assert len(response.results) == 1024
    assert response.ByteSize() > 314_159


async def test_client_compressed_unary(served):
    """A compressed request is answered like any other."""
    response = await served.stub.Detect(request_for(1), compression=grpc.Compression.Gzip)
    assert response.results[0].label_name == CLASSES[1]


async def test_ping_pong(served):
    """A stream whose next request waits for the answer to the last one."""
    call = served.stub.DetectStream()
    for value in range(20):
        await call.write(pb.DetectStreamRequest(request=request_for(value)))
        assert (await call.read()).response.results[0].score == value
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_empty_stream(served):
    """A stream that ends before anything was sent ends well."""
    call = served.stub.DetectStream()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_cancel_after_begin(served):
    """A stream that is cancelled before anything was sent is cancelled, and the server goes on."""
    call = served.stub.DetectStream()
    await call.wait_for_connection()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.read()
    assert await call.code() is grpc.StatusCode.CANCELLED
    assert (await served.stub.Detect(request_for(1))).results[0].score == 1.0


async def test_cancel_after_first_response(served):
    """A stream that is cancelled after an answer is cancelled, and the server goes on."""
    call = served.stub.DetectStream()
    await call.write(pb.DetectStreamRequest(request=request_for(5)))
    assert (await call.read()).response.results[0].score == 5.0
    call.cancel()
    assert await call.code() is grpc.StatusCode.CANCELLED
    assert (await served.stub.Detect(request_for(1))).results[0].score == 1.0


@pytest.mark.parametrize("streamed", [False, True])
async def test_timeout_on_sleeping_server(served, streamed):
    """A deadline that passes while the server sleeps is told as such."""
    served.detector.hold()
    if streamed:
        call = served.stub.DetectStream(timeout=0.05)
        await call.write(pb.DetectStreamRequest(request=request_for(1)))
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    else:
        assert (await refusal(served.stub.Detect(request_for(1), timeout=0.05)))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    served.detector.gate.set()
    assert (await served.stub.Detect(request_for(2))).results[0].score == 2.0


@pytest.mark.parametrize("streamed", [False, True])
async def test_status_code_and_message(served, streamed):
    """Code and text of an error arrive, from a single call and from a stream."""
    request = pb.DetectRequest(images=[message_of(1)], model="other")
    if streamed:
        call = served.stub.DetectStream()
        await call.write(pb.DetectStreamRequest(request=request))
        code, text = await call.code(), await call.details()
    else:
        code, text, _ = await refusal(served.stub.Detect(request))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "got 'other'" in text


async def test_special_status_message(served):
    """White space and letters of all alphabets arrive as they are."""
    special = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"
    code, text, status = await refusal(served.stub.Detect(pb.DetectRequest(images=[message_of(1)], model=special)))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "test with whitespace" in text
    assert "Unicode BMP ☺ and non-BMP 😈" in text
    assert text == status.message


async def test_unimplemented_method(served):
    """A method that the service does not have."""
    call = served.channel.unary_unary("/pathguard.v1.DetectionService/UnimplementedCall")
    assert (await refusal(call(b"")))[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_unimplemented_service(served):
    """A service that the server does not have."""
    call = served.channel.unary_unary("/pathguard.v1.UnimplementedService/UnimplementedCall")
    assert (await refusal(call(b"")))[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_concurrent_large_unary(served):
    """Many large calls at once, over one connection."""
    requests = [pb.DetectRequest(images=[message_of(n)] * 100 + [pb.Image(encoded=bytes(100_000))]) for n in range(20)]
    responses = await asyncio.gather(*(served.stub.Detect(request) for request in requests))
    assert [response.results[0].score for response in responses] == list(range(20))
