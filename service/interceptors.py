"""One interceptor that goes around every handler, and its wrapper for errors: what a handler raises becomes a status,
and nothing else of it reaches the caller.

Without it grpcio sends the text of an unhandled exception to the client, and a handler that raises CancelledError
leaves the client waiting until its deadline.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias, cast, final

import grpc
from google.rpc.status_pb2 import Status

from service.errors import InvalidRequestError, status_of
from service.records.logs import REQUEST_ID_KEY, request_id

Context = grpc.aio.ServicerContext[Any, Any]

DETAILS_KEY = "grpc-status-details-bin"

_CODES = {code.value[0]: code for code in grpc.StatusCode}


Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Single = Callable[[Any, Context], Awaitable[Any]]
Stream = Callable[[Any, Context], AsyncIterator[Any]]


class Wrapper(Protocol):
    """Goes around the handlers of RPCs. Called once for each method, when it is first used."""

    def single(self, method: str, behaviour: Single) -> Single:
        """Goes around a handler that answers once."""

    def stream(self, method: str, behaviour: Stream) -> Stream:
        """Goes around a handler that answers with a stream."""


@final
class WrappingInterceptor(grpc.aio.ServerInterceptor):
    """Puts wrappers around every handler, the first one outermost."""

    def __init__(self, *wrappers: Wrapper) -> None:
        """Starts without having seen any method."""
        self._wrappers = wrappers
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Wraps the handler that `continuation` finds; None, for an unknown method, stays None."""
        method = handler_call_details.method
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            handler = _told_of_damage(handler, method)
            for wrapper in reversed(self._wrappers):
                handler = _wrapped(handler, method, wrapper)
            self._wrapped[method] = handler
        return self._wrapped[method]


class ErrorWrapper:
    """Ends failed RPCs with the status that `service.errors` gives, as `google.rpc.Status` with all its details."""

    def __init__(self, on_error: Callable[[BaseException], None] = lambda _error: None) -> None:
        """`on_error` is told of every error that a handler raised; it must not raise."""
        self._on_error = on_error

    def single(self, method: str, behaviour: Single) -> Single:
        """Goes around a handler that answers once."""

        async def guarded(request: Any, context: Context) -> Any:
            try:
                return await behaviour(request, context)
            except (Exception, asyncio.CancelledError) as error:
                self._on_error(error)
                await _end(context, error)

        return guarded

    def stream(self, method: str, behaviour: Stream) -> Stream:
        """Goes around a handler that answers with a stream."""

        async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                async for response in behaviour(request, context):
                    yield response
            except (Exception, asyncio.CancelledError) as error:
                self._on_error(error)
                await _end(context, error)

        return guarded


@dataclass(frozen=True, slots=True)
class _Damaged:
    """In the place of a request that could not be read; gRPC itself would tell the caller what the parser said."""

    size: int


def _told_of_damage(handler: Any, method: str) -> Handler:
    """The handler, which refuses as malformed what its parser does not take."""
    read = handler.request_deserializer
    if read is None:
        return cast(Handler, handler)

    def tolerant(content: bytes) -> Any:
        try:
            return read(content)
        except Exception:
            return _Damaged(len(content))

    return _wrapped(handler, method, _DamageWrapper(), tolerant)


class _DamageWrapper:
    """Goes innermost, so that its refusal goes the way of every other."""

    def single(self, method: str, behaviour: Single) -> Single:
        async def checked(request: Any, context: Context) -> Any:
            return await behaviour(_whole(request), context)

        return checked

    def stream(self, method: str, behaviour: Stream) -> Stream:
        def checked(request: Any, context: Context) -> AsyncIterator[Any]:
            return behaviour(_whole(request), context)

        return checked


def _whole(request: Any) -> Any:
    """The request, or the stream of requests, as it is where it could be read."""
    if isinstance(request, _Damaged):
        raise InvalidRequestError({"request": f"expected a message of this method, got {request.size} other bytes"})
    return _all_whole(request) if hasattr(request, "__aiter__") else request


async def _all_whole(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _whole(request)


def _wrapped(handler: Any, method: str, wrapper: Wrapper, read: Any = None) -> Handler:
    coders = (read or handler.request_deserializer, handler.response_serializer)
    if handler.response_streaming:
        stream = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return stream(wrapper.stream(method, handler.stream_stream or handler.unary_stream), *coders)
    single = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
    return single(wrapper.single(method, handler.stream_unary or handler.unary_unary), *coders)


async def _end(context: Context, error: BaseException) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, asyncio.CancelledError) and _is_cancelled():
        raise error
    await abort_with(context, status_of(error))


async def abort_with(context: Context, status: Status) -> NoReturn:
    """Ends the RPC with `status` and its details, and with its id where it has one."""
    details: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString())]
    if number := request_id():
        details.append((REQUEST_ID_KEY, number))
    await context.abort(_CODES[status.code], status.message, tuple(details))


def code_of(context: Any) -> int:
    """The status that ended a failed RPC: what it was aborted with, or UNKNOWN, which gRPC then makes of it."""
    code = context.code()
    return int(code.value[0]) if isinstance(code, grpc.StatusCode) else int(code or grpc.StatusCode.UNKNOWN.value[0])


def _is_cancelled() -> bool:
    """Whether somebody cancelled this RPC, rather than its handler having run into somebody else's cancellation."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
