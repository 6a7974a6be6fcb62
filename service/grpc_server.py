"""gRPC's asyncio server, which no call can end, and which loses no time between a call's arrival and its handler.

grpc.aio reads the name of a method that nobody registered as UTF-8; one that is none raises in its own loop (seen with
grpcio 1.85.1), out of reach of any interceptor, and ends the server: the port is closed, and calls that come in that
moment are answered by nobody. That loop also waits for the next call of each method anew whenever one has come, which
costs the more the more methods there are. All methods of this service are registered; here each of them takes its calls
by itself, those of unknown methods are told so before anybody asks for their name, and that loop hears of none.

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
    """Gives its loop no call."""

    def __init__(self, loop: Any, pool: Any, generic: Any, interceptors: Any, *rest: Any) -> None:
        super().__init__(loop, pool, generic, interceptors, *rest)
        self._around = tuple(interceptors)
        self._known: dict[str, Any] = {}
        self._answers: set[asyncio.Task[None]] = set()

    def add_registered_method_handlers(self, handlers: dict[str, Any]) -> None:
        """Remembers them as well."""
        super().add_registered_method_handlers(handlers)
        self._known.update(handlers)

    async def _request_registered_call(self, method: bytes) -> None:
        """Answers calls of one method; ends with an error when the server stops."""
        resolver = _cygrpc._MethodResolver([], self._known)
        while True:
            self._answer(await super()._request_registered_call(method), method.decode(), resolver)

    async def _request_call(self) -> None:
        """The same for calls of unknown methods, which come to no interceptor."""
        resolver = _cygrpc._MethodResolver([], {})
        while True:
            self._answer(await super()._request_call(), "", resolver)

    def _answer(self, call: Any, method: str, resolver: Any) -> None:
        loop, around = asyncio.get_running_loop(), self._around if method else ()
        handled = _cygrpc._handle_rpc(method, resolver, around, call, loop, False)
        answer = loop.create_task(_cygrpc._schedule_rpc_coro(handled, call, loop, method))
        # A loop holds its tasks weakly.
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)


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
