"""gRPC's asyncio server, which no call can end.

grpc.aio reads the name of a method that nobody registered as UTF-8; one that is none raises in its own loop (seen with
grpcio 1.85.1), out of reach of any interceptor, and ends the server: the port is closed, and calls that come in that
moment are answered by nobody. All methods of this service are registered, so that calls of others, which can only be
told that there is no such method, are answered here before that loop asks for their name.

There is no public way to do so. Where grpcio's insides are others than expected the server is the plain one, and
`service.listener` puts another one in its place when it ends.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import grpc
import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]

_cygrpc: Final[Any] = cygrpc
_Plain: Final[Any] = _cygrpc.AioServer
_KNOWN: Final = all(
    hasattr(where, name)
    for where, names in (
        (_Plain, ("_request_call", "_request_registered_call", "_make_request_call_future")),
        (_cygrpc, ("_MethodResolver", "_handle_rpc", "_schedule_rpc_coro")),
    )
    for name in names
)


class _Answering(_Plain):  # type: ignore[misc]
    """Gives its loop no call of an unknown method."""

    async def _request_call(self) -> Any:
        """Asks gRPC for calls of unknown methods, and answers them; ends with an error when the server stops."""
        loop, answers = asyncio.get_running_loop(), set()
        nothing = _cygrpc._MethodResolver([], {})
        while True:
            call = await super()._request_call()
            unknown = _cygrpc._handle_rpc("", nothing, (), call, loop, False)
            answer = loop.create_task(_cygrpc._schedule_rpc_coro(unknown, call, loop, "unknown"))
            answers.add(answer)
            answer.add_done_callback(answers.discard)


def grpc_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, Any]]
) -> grpc.aio.Server:
    """A server that is not started; needs a running event loop. All of its methods must be registered ones.

    Args:
        interceptors: as `grpc.aio.server` takes them; calls of unknown methods do not come to them.
        options: likewise.
    """
    _cygrpc.AioServer = _Answering if _KNOWN else _Plain
    try:
        return grpc.aio.server(interceptors=interceptors, options=options)
    finally:
        _cygrpc.AioServer = _Plain
