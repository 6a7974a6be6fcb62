import asyncio
import logging

import grpc
import pytest

from detector.errors import ImageError
from service.interceptors import ErrorWrapper, WrappingInterceptor

ABORTED = "the handler's own abort"
WAITING = asyncio.Event()


async def fail(request, context):
    match request:
        case b"abort":
            await context.abort(grpc.StatusCode.ABORTED, ABORTED)
        case b"unexpected":
            raise RuntimeError("secret text")
        case b"known":
            raise ImageError("expected an image")
        case b"cancelled":
            raise asyncio.CancelledError
        case b"wait":
            WAITING.set()
            await asyncio.Event().wait()
    return request


async def fail_in_stream(request, context):
    yield b"first"
    yield await fail(request, context)


async def fail_after_reading(requests, context):
    return await fail(b"".join([part async for part in requests]), context)


async def answer_each(requests, context):
    async for part in requests:
        yield await fail(part, context)


@pytest.fixture
async def channel():
    server = grpc.aio.server(interceptors=[WrappingInterceptor(ErrorWrapper())], options=[("grpc.so_reuseport", 0)])
    handlers = {
        "single": grpc.unary_unary_rpc_method_handler(fail, read),
        "stream": grpc.unary_stream_rpc_method_handler(fail_in_stream, read),
        "upload": grpc.stream_unary_rpc_method_handler(fail_after_reading, read),
        "talk": grpc.stream_stream_rpc_method_handler(answer_each, read),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def call(channel, kind, request):
    match kind:
        case "single":
            return [await channel.unary_unary("/test/single")(request, timeout=30)]
        case "stream":
            return [part async for part in channel.unary_stream("/test/stream")(request, timeout=30)]
        case "upload":
            return [await channel.stream_unary("/test/upload")(iter([request]), timeout=30)]
        case _:
            return [part async for part in channel.stream_stream("/test/talk")(iter([request]), timeout=30)]


kinds = pytest.mark.parametrize("kind", ["single", "stream", "upload", "talk"])


@kinds
async def test_an_answer_goes_through(channel, kind):
    assert (await call(channel, kind, b"fine"))[-1] == b"fine"


@kinds
@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (b"abort", grpc.StatusCode.ABORTED, ABORTED),
        (b"known", grpc.StatusCode.INVALID_ARGUMENT, "expected an image"),
        (b"unexpected", grpc.StatusCode.INTERNAL, "internal error, id "),
        (b"cancelled", grpc.StatusCode.INTERNAL, "internal error, id "),
    ],
)
async def test_what_a_handler_raises_becomes_a_status_and_no_secret_leaves(channel, kind, request_, code, text, caplog):
    with caplog.at_level(logging.CRITICAL), pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, kind, request_)
    assert caught.value.code() is code
    assert caught.value.details().startswith(text)
    assert "secret" not in str(caught.value) + str(caught.value.trailing_metadata())


def read(content):
    if content == b"damaged":
        raise ValueError("secret of the parser")
    return content


@kinds
async def test_a_request_that_cannot_be_read_is_the_callers_fault_and_the_parsers_words_stay_here(channel, kind):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, kind, b"damaged")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "request: expected a message of this method, got 7 other bytes"


async def test_a_caller_who_leaves_is_let_go(channel, caplog):
    pending = channel.unary_unary("/test/single")(b"wait")
    await WAITING.wait()
    pending.cancel()
    assert (await call(channel, "single", b"fine")) == [b"fine"]
    assert "internal error" not in caplog.text


async def test_an_unknown_method_is_unimplemented(channel):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/test/other")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
