"""gRPC's server on its port, and another one in its place should it end by itself.

An error in the loop of grpc.aio itself closes the port for good, while the process lives on and nobody hears of it. One
cause is known, a call whose path is no UTF-8, and kept away by `service.grpc_server` where it can; whatever it is, one
call from anybody who can connect must not be the end.
"""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

import grpc

from service.errors import AddressError

_log = logging.getLogger(__name__)

_LOOK_EVERY_SECONDS: Final = 0.05
# How long the port may stay taken by the server that ended.
_REBIND_SECONDS: Final = 5.0
_REBIND_EVERY_SECONDS: Final = 0.02
# Servers that ended and may still have calls on their way; the oldest are let go.
_MOST_ENDED: Final = 16


class Listener:
    """`start`, then `watch` for as long as it shall listen, then `stop`; all in one event loop."""

    def __init__(
        self,
        make: Callable[[], grpc.aio.Server],
        credentials: Callable[[], grpc.ServerCredentials | None],
        host: str,
        port: int,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        """Listens nowhere yet.

        Args:
            make: a server with its services, not started.
            credentials: for encryption; None to listen without.
            host: address to listen on.
            port: TCP port; 0 takes any free one.
            on_restart: told when another server takes the place of one that ended.
        """
        self._make = make
        self._credentials = credentials
        self._host = host
        self._port = port
        self._on_restart = on_restart
        self._server = make()
        self._ended: list[grpc.aio.Server] = []

    async def start(self) -> int:
        """Listens.

        Returns:
            The port.

        Raises:
            AddressError: the port is in use, or the host is not an address of this machine.
        """
        self._port = _listen(self._server, self._host, self._port, self._credentials())
        await self._server.start()
        return self._port

    async def watch(self) -> None:
        """Puts another server in the place of one that ended, for ever.

        Raises:
            AddressError: the port cannot be had again.
        """
        while True:
            try:
                await self._server.wait_for_termination(_LOOK_EVERY_SECONDS)
            except Exception as error:
                _log.error("gRPC ended its server (%s), another one takes its place", type(error).__name__)
                self._on_restart()
                await self._replace()

    async def stop(self, grace_seconds: float) -> None:
        """Closes the port, and ends what is still under way after `grace_seconds`."""
        await self._server.stop(grace_seconds)

    async def _replace(self) -> None:
        # Not stopped: the calls on their way go on to their end.
        self._ended = [*self._ended, self._server][-_MOST_ENDED:]
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _REBIND_SECONDS
        while True:
            server = self._make()
            try:
                _listen(server, self._host, self._port, self._credentials())
            except AddressError:
                if loop.time() > give_up:
                    raise
                await asyncio.sleep(_REBIND_EVERY_SECONDS)
            else:
                await server.start()
                self._server = server
                return


def address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _listen(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    # A plain socket first: it says why it cannot be bound, where gRPC only logs and raises a general error.
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use(host, port) from None
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise AddressError(f"expected an address to listen on, got {address(host, port)}: {reason}") from None
    try:
        if credentials is not None:
            return server.add_secure_port(address(host, port), credentials)
        return server.add_insecure_port(address(host, port))
    except RuntimeError:
        raise _in_use(host, port) from None


def _in_use(host: str, port: int) -> AddressError:
    return AddressError(f"expected a free port, got port {port} of {host}, which is in use by another program")
