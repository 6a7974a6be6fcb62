"""`grpc.health.v1`: tells load balancers and probes whether the server wants calls.

Not the servicer of grpcio-health-checking: there, the first of two watchers of one service that leaves takes the other
one's updates away, and Watch streams keep a stopping server waiting until its grace is over.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

Context = grpc.aio.ServicerContext[Any, Any]


class Health(HealthServicer):
    """Health of the server as a whole (`""`) and of each of its services: all serve, or none does."""

    def __init__(self, services: Collection[str], on_change: Callable[[bool], None] = lambda _serving: None) -> None:
        """Starts as NOT_SERVING.

        Args:
            services: full names such as `pathguard.v1.DetectionService`.
            on_change: told whenever it is set whether they serve.
        """
        self._on_change = on_change
        self._services = frozenset(services) | {""}
        self._serving = False
        self._closed = False
        self._changed = asyncio.Event()

    def healthy(self) -> bool:
        """Whether everything serves; safe from any thread."""
        return self._serving

    def set_serving(self, serving: bool) -> None:
        """Tells everybody who asks or watches."""
        self._serving = serving
        self._on_change(serving)
        self._tell_watchers()

    def close(self) -> None:
        """Ends all Watch streams after they have told the last state."""
        self._closed = True
        self._tell_watchers()

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:
        """The state now; NOT_FOUND for a service that this server does not have."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"expected a service of this server, got {request.service}")
        return HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self,
        request: HealthCheckRequest,
        context: Context,
    ) -> AsyncIterator[HealthCheckResponse]:
        """The state now, and each change of it."""
        told = None
        while True:
            changed, closed, status = self._changed, self._closed, self._status(request.service)
            if status != told:
                told = status
                yield HealthCheckResponse(status=status)
            if closed:
                return
            await changed.wait()

    def _status(self, service: str) -> HealthCheckResponse.ServingStatus:
        if service not in self._services:
            return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if self._serving else HealthCheckResponse.NOT_SERVING

    def _tell_watchers(self) -> None:
        # A fresh event for the next change: each watcher waits on the one it saw before it looked at the state.
        self._changed.set()
        self._changed = asyncio.Event()
