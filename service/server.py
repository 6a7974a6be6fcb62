"""Wires the server, starts it, and stops it without losing an accepted request."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import grpc
import numpy as np
from grpc_health.v1.health_pb2 import DESCRIPTOR as HEALTH
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from detector.images import Pixels
from protos.pathguard.v1.detection_pb2 import DESCRIPTOR as DETECTION
from protos.pathguard.v1.detection_pb2_grpc import add_DetectionServiceServicer_to_server
from service.batching import MicroBatcher
from service.config import ServiceConfig
from service.errors import AddressError, ConfigError
from service.health import Health
from service.interceptors import ErrorWrapper, WrappingInterceptor
from service.lifecycle import Lifecycle
from service.model import Answer, Model, ask
from service.servicer import DetectionServicer

_log = logging.getLogger(__name__)

# After the last call has been answered: time for the answer to leave.
_LAST_WORDS_SECONDS = 1.0


class Server:
    """One model on one port. `start`, `warm_up`, and in the end `stop`; all in one event loop."""

    def __init__(self, model: Model, config: ServiceConfig) -> None:
        """Wires everything and listens nowhere yet; needs a running event loop.

        Raises:
            ConfigError: the largest request that `config` allows would never be admitted with this model's images.
        """
        spec = model.spec
        largest = config.max_images_per_request * spec.height * spec.width * spec.channels
        if largest > config.max_pending_bytes:
            raise ConfigError(
                f"expected max_pending_bytes of at least {largest} for {config.max_images_per_request} images of "
                f"{spec}, got {config.max_pending_bytes}: raise it, or lower max_images_per_request"
            )
        self._model = model
        self._config = config
        self._batcher = MicroBatcher[Pixels, Answer](
            partial(ask, model),
            max_batch=config.max_batch,
            max_wait_seconds=config.max_wait_seconds,
            max_pending_items=config.max_pending_images,
            max_pending_bytes=config.max_pending_bytes,
        )
        self._decoders = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._lifecycle = Lifecycle()
        service = DETECTION.services_by_name["DetectionService"].full_name
        health = HEALTH.services_by_name["Health"].full_name
        self._health = Health([service])
        self._server = grpc.aio.server(
            interceptors=[WrappingInterceptor(ErrorWrapper())],
            options=[
                # On by default: a second server would take the same port in silence, and half of the calls.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
            ],
        )
        servicer = DetectionServicer(model, self._batcher, self._decoders, self._lifecycle, config)
        add_DetectionServiceServicer_to_server(servicer, self._server)
        add_HealthServicer_to_server(self._health, self._server)  # type: ignore[no-untyped-call]
        if config.reflection:
            names = [service, health, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self._server)  # type: ignore[no-untyped-call]

    async def start(self) -> int:
        """Listens, and answers UNAVAILABLE until `warm_up` is done.

        Returns:
            The port, also where the configuration says 0.

        Raises:
            AddressError: the port is in use, or the host is not an address of this machine.
        """
        port = _listen(self._server, self._config.host, self._config.port)
        await self._server.start()
        return port

    async def warm_up(self) -> None:
        """Runs the smallest and the largest batch, which also teaches the batcher how long they take; then serves.

        Raises:
            Exception: whatever the model raised; the server does not serve then.
        """
        spec = self._model.spec
        blank = np.zeros((spec.height, spec.width, spec.channels), dtype=np.uint8)
        for count in (1, self._config.max_batch):
            for answer in await self._batcher.submit([blank] * count):
                if isinstance(answer, BaseException):
                    raise answer
        self._lifecycle.open()
        self._health.set_serving(True)

    async def stop(self) -> None:
        """Says NOT_SERVING, then refuses new calls, then waits for those that were taken, then ends."""
        self._health.set_serving(False)
        if self._lifecycle.opened:
            await asyncio.sleep(self._config.notice_seconds)
        self._lifecycle.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._lifecycle.idle(), self._config.drain_seconds)
        await self._batcher.close()
        self._health.close()
        await self._server.stop(_LAST_WORDS_SECONDS)
        self._decoders.shutdown(wait=False, cancel_futures=True)


async def serve(model: Model, config: ServiceConfig, *, on_ready: Callable[[int], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then stops gracefully.

    Args:
        model: the detector.
        config: how to serve it.
        on_ready: called with the port once calls are answered.

    Raises:
        AddressError: the port is in use, or the host is not an address of this machine.
        ConfigError: `config` does not fit `model`.
        Exception: whatever the model raised at warm-up.
    """
    loop = asyncio.get_running_loop()
    asked_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    try:
        async with serving(model, config) as port:
            if on_ready is not None:
                on_ready(port)
            await asked_to_stop.wait()
            _log.info("stopping")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def run(model: Model, config: ServiceConfig, *, on_ready: Callable[[int], None] | None = None) -> None:
    """`serve` in an event loop of its own; blocks until SIGTERM or SIGINT. For a process's main thread."""
    asyncio.run(serve(model, config, on_ready=on_ready))


@asynccontextmanager
async def serving(model: Model, config: ServiceConfig) -> AsyncIterator[int]:
    """A warm server in the running event loop, stopped at the end; gives its port."""
    server = Server(model, config)
    try:
        port = await server.start()
        await server.warm_up()
        yield port
    finally:
        await server.stop()


@contextmanager
def running_server(model: Model, config: ServiceConfig) -> Iterator[str]:
    """A warm server in a thread of its own, stopped at the end; gives its target, such as `127.0.0.1:50051`.

    Raises:
        AddressError, ConfigError, Exception: as `serve`.
    """
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def work() -> None:
        over = asyncio.Event()
        async with serving(model, config) as port:
            started.set_result((port, asyncio.get_running_loop(), over))
            await over.wait()

    def thread() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    worker = threading.Thread(target=thread, name="server")
    worker.start()
    try:
        port, loop, over = started.result()
        try:
            yield address(config.host, port)
        finally:
            loop.call_soon_threadsafe(over.set)
    finally:
        worker.join()


def address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _listen(server: grpc.aio.Server, host: str, port: int) -> int:
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
        return server.add_insecure_port(address(host, port))
    except RuntimeError:
        raise _in_use(host, port) from None


def _in_use(host: str, port: int) -> AddressError:
    return AddressError(f"expected a free port, got port {port} of {host}, which is in use by another program")
