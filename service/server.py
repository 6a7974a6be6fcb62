"""Wires the server, starts it, looks after it, and stops it without losing an accepted request."""

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1.health_pb2 import DESCRIPTOR as HEALTH
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from detector.images import Pixels
from detector.memory import keep_freed_memory
from protos.inference.grpc_service_pb2 import DESCRIPTOR as INFERENCE
from protos.inference.grpc_service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from protos.pathguard.v1.detection_pb2 import DESCRIPTOR as DETECTION
from protos.pathguard.v1.detection_pb2_grpc import add_DetectionServiceServicer_to_server
from service.access.credentials import Credentials, parse_credentials
from service.access.quotas import Quotas
from service.access.wrapper import AccessWrapper
from service.batching import BatchRun, MicroBatcher
from service.config import ServiceConfig
from service.errors import ConfigError
from service.grpc_server import grpc_server
from service.health import Health
from service.inference_servicer import InferenceServicer
from service.interceptors import ErrorWrapper, Wrapper, WrappingInterceptor
from service.kept_files import KeptFiles
from service.lifecycle import Lifecycle
from service.listener import Listener, address
from service.model import Answer, Job, Model, ask, is_brief, run_jobs
from service.models.keeper import Keeper, Load, show_models
from service.models.registry import Registry, served
from service.models.repository import Repository
from service.pipeline import Pipeline
from service.processors import keep_to, roam
from service.records.books import Books
from service.records.telemetry import CallWrapper, Metrics, MetricsServer
from service.servicer import DetectionServicer
from service.statistics import Statistics
from service.threads import in_thread
from service.ui.page_server import PageServer

_log = logging.getLogger(__name__)

_SERVICES = (
    DETECTION.services_by_name["DetectionService"].full_name,
    INFERENCE.services_by_name["GRPCInferenceService"].full_name,
)
# After the last call has been answered: time for the answer to leave.
_LAST_WORDS_SECONDS = 1.0
# After so long without a word a connection is asked whether it is still there, and has as long to answer.
_KEEPALIVE_MILLISECONDS = 60_000
# After so long a thread that waits for Python's lock gets it: the model's, which needs it for a moment between two
# batches, shall not wait until the event loop has written all answers of the last one (Python's default is 5 ms).
_SWITCH_SECONDS = 0.0002
# How long files of certificates and credentials may take to read, and the last records to be written.
_FILES_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where models come from and go on coming from.

    Attributes:
        repository: the bundles.
        load: makes a model of one, in a thread.
        lanes: how many batches its models run at once: as many as replicas of them there may be.
    """

    repository: Repository
    load: Load
    lanes: int = 1


class Server:
    """Models on one port. `start`, `warm_up`, and in the end `stop`; all in one event loop."""

    def __init__(self, models: Model | ModelSource, config: ServiceConfig) -> None:
        """Wires everything and listens nowhere yet; needs a running event loop.

        Args:
            models: one model, as it is, or where models come from.
            config: how to serve them.

        Raises:
            ConfigError: the largest request that `config` allows would never be admitted with this model's images, or
                the audit log cannot be written.
            SettingsFileError: certificates or credentials are not as expected.
        """
        self._config = config
        self._metrics = metrics = Metrics(_version())
        self._registry = Registry(config.models.default)
        self._keeper: Keeper | None = None
        if isinstance(models, ModelSource):
            self._keeper = Keeper(
                models.repository, models.load, self._check, self._registry, config.models, self._metrics
            )
        else:
            self._check_size(models)
            entry = served(models)
            if config.models.default not in ("", entry.name):
                raise ConfigError(f"expected models_default of {entry.name}, got {config.models.default!r}")
            self._registry.put(entry.name, {entry.version: entry}, entry.version)
            show_models(self._registry.all(), metrics)
        self._certificate = None
        if config.tls.certificate:
            # Loaded only where it is needed: cryptography takes a while.
            from service.access.certificates import kept_certificate

            self._certificate = kept_certificate(config.tls, metrics.file_read)
            metrics.certificate_ends(self._certificate.value.ends)
        self._credentials: KeptFiles[Credentials] | None = None
        if config.access.file:
            self._credentials = KeptFiles(
                "credentials", [Path(config.access.file)], parse_credentials, metrics.file_read
            )
        self._tracing = None
        if config.traces:
            from service.records.tracing import TraceWrapper, otlp_provider

            self._tracing = TraceWrapper(otlp_provider(_version()))
        self._books = Books(config, metrics)
        self._statistics = Statistics()
        self._batcher = MicroBatcher[Job, Answer](
            run_jobs,
            max_batch=config.max_batch,
            max_wait_seconds=config.max_wait_seconds,
            max_pending_items=config.max_pending_images,
            max_pending_bytes=config.max_pending_bytes,
            on_batch=self._count_batch,
            brief=is_brief,
            lanes=models.lanes if isinstance(models, ModelSource) else 1,
        )
        metrics.queue_images.set_function(lambda: self._batcher.pending_items)
        metrics.answered_in_full.set_function(lambda: sum(model.answered_in_full for model in self._registry.all()))
        self._decoders = ThreadPoolExecutor(config.decode_threads, "decode", roam)
        self._explainers = ThreadPoolExecutor(1, "explain", roam)
        self._lifecycle = Lifecycle()
        self._health = Health(_SERVICES, lambda serving: metrics.serving.set(serving))
        images = _quotas("images", config.access.images_per_second, config)
        pipeline = Pipeline(self._batcher, self._decoders, self._explainers, config, images, self._books)
        parts = (self._registry, pipeline, self._lifecycle, config, self._statistics)
        self._detection = DetectionServicer(*parts)
        self._inference = InferenceServicer(*parts, _version())
        self._interceptor = WrappingInterceptor(*self._wrappers())
        self._listener = Listener(self._made_server, self._tls, config.host, config.port, metrics.server_restarts.inc)
        self._metrics_server: MetricsServer | None = None
        self._page_server: PageServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None
        self._stalled = False

    @property
    def metrics_port(self) -> int | None:
        """Port of the metrics once the server has started; None where there are none."""
        return None if self._metrics_server is None else self._metrics_server.port

    @property
    def page_port(self) -> int | None:
        """Port of the page once the server has started; None where there is none."""
        return None if self._page_server is None else self._page_server.port

    async def start(self) -> int:
        """Loads the models, listens, and answers UNAVAILABLE until `warm_up` is done.

        Returns:
            The port, also where the configuration says 0.

        Raises:
            AddressError: a port is in use, or a host is not an address of this machine.
            ArtifactError, ConfigError, SettingsFileError, Exception: a model cannot be served.
        """
        if self._keeper is not None:
            await self._keeper.begin()
        if self._config.metrics.port is not None:
            self._metrics_server = MetricsServer(self._config.metrics, self._metrics.registry, self._health.healthy)
            _log.info("metrics on %s", address(self._config.metrics.host, self._metrics_server.port))
        if self._config.ui.port is not None:
            self._page_server = PageServer(
                self._config.ui, self._config.max_pixels, lambda: self._registry.find(""), self._books.recent
            )
            _log.info("page on http://%s", address(self._config.ui.host, self._page_server.port))
        return await self._listener.start()

    async def warm_up(self) -> None:
        """Runs the smallest and the largest batch, which also teaches the batcher how long they take; then serves.

        Raises:
            Exception: whatever a model raised; the server does not serve then.
        """
        for model in self._registry.all():
            blank = _blank(model)
            for count in (1, self._config.max_batch):
                for answer in await self._batcher.submit([Job(model, blank) for _ in range(count)]):
                    if isinstance(answer, BaseException):
                        raise answer
        self._lifecycle.open()
        self._health.set_serving(True)
        self._watching = asyncio.create_task(self._listener.watch())
        self._tasks = [
            self._watching,
            asyncio.create_task(self._reread_files()),
            asyncio.create_task(self._watch_for_stalls()),
        ]
        if self._keeper is not None:
            self._tasks.append(asyncio.create_task(self._keeper.keep()))

    async def listens(self) -> None:
        """Returns never, once warm.

        Raises:
            AddressError: the port was lost and cannot be had again.
        """
        assert self._watching is not None
        await asyncio.shield(self._watching)

    async def stop(self) -> None:
        """Says NOT_SERVING, then refuses new calls, then waits for those that were taken, then ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._health.set_serving(False)
        opened = self._lifecycle.opened
        if opened:
            await asyncio.sleep(self._config.notice_seconds)
        self._lifecycle.close()
        # Calls that have arrived but not been looked at yet still hear that they are refused, rather than nothing.
        farewell = asyncio.create_task(asyncio.sleep(self._config.notice_seconds if opened else 0))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._lifecycle.idle(), self._config.drain_seconds)
        await farewell
        await self._batcher.close()
        self._health.close()
        await self._listener.stop(_LAST_WORDS_SECONDS)
        for threads in (self._decoders, self._explainers):
            threads.shutdown(wait=False, cancel_futures=True)
        for beside in (self._metrics_server, self._page_server):
            if beside is not None:
                beside.close()
        with contextlib.suppress(TimeoutError):
            await in_thread(self._close_records, _FILES_SECONDS)

    def _made_server(self) -> grpc.aio.Server:
        """gRPC's server with all services, not started."""
        config = self._config
        server = grpc_server(
            [self._interceptor],
            [
                # On by default: a second server would take the same port in silence, and half of the calls.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.max_concurrent_streams", config.max_calls_per_connection),
                # Whose machine has gone without a word is let go.
                ("grpc.keepalive_time_ms", _KEEPALIVE_MILLISECONDS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_MILLISECONDS),
            ],
        )
        add_DetectionServiceServicer_to_server(self._detection, server)
        add_GRPCInferenceServiceServicer_to_server(self._inference, server)
        add_HealthServicer_to_server(self._health, server)  # type: ignore[no-untyped-call]
        if config.reflection:
            names = [*_SERVICES, HEALTH.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, server)  # type: ignore[no-untyped-call]
        return server

    def _tls(self) -> grpc.ServerCredentials | None:
        if self._certificate is None:
            return None
        from service.access.certificates import server_credentials

        return server_credentials(self._certificate, ask_clients=bool(self._config.tls.client_ca))

    def _wrappers(self) -> list[Wrapper]:
        """What goes around every call, the outermost first."""
        config, kept = self._config, self._credentials
        calls = _quotas("calls", config.access.calls_per_second, config)
        return [
            CallWrapper(self._metrics, log_calls=config.log.calls),
            *([] if self._tracing is None else [self._tracing]),
            ErrorWrapper(self._metrics.error_raised),
            AccessWrapper(
                lambda: None if kept is None else kept.value,
                calls,
                config.max_call_seconds,
                by_certificate=bool(config.tls.client_ca),
            ),
        ]

    def _check(self, model: Model) -> None:
        """Runs a model that shall come into service, in the thread that loaded it.

        Raises:
            ConfigError: it does not fit the configuration.
            Exception: whatever it raised.
        """
        self._check_size(model)
        for count in (1, self._config.max_batch):
            ask(model, [_blank(model)] * count)

    def _check_size(self, model: Model) -> None:
        spec, config = model.spec, self._config
        largest = config.max_images_per_request * spec.height * spec.width * spec.channels
        if largest > config.max_pending_bytes:
            raise ConfigError(
                f"expected max_pending_bytes of at least {largest} for {config.max_images_per_request} images of "
                f"{spec}, got {config.max_pending_bytes}: raise it, or lower max_images_per_request"
            )

    def _count_batch(self, run: BatchRun[Job]) -> None:
        self._metrics.batch_ran(run)
        self._statistics.batch(run)

    async def _reread_files(self) -> None:
        """Looks at certificates and credentials again and again."""
        while True:
            await asyncio.sleep(self._config.reload_seconds)
            try:
                await in_thread(self._refresh, _FILES_SECONDS)
            except Exception:
                # Whatever it is, what was read last goes on.
                _log.exception("certificates and credentials could not be looked at")

    def _refresh(self) -> None:
        if self._certificate is not None and self._certificate.refresh():
            self._metrics.certificate_ends(self._certificate.value.ends)
        if self._credentials is not None:
            self._credentials.refresh()

    async def _watch_for_stalls(self) -> None:
        """Says NOT_SERVING while a batch takes far too long, so that whoever watches can start the server anew."""
        while True:
            await asyncio.sleep(self._config.stall_seconds / 4)
            stalled = self._batcher.running_seconds > self._config.stall_seconds
            if stalled != self._stalled:
                self._stalled = stalled
                self._health.set_serving(not stalled)
                if stalled:
                    _log.error("the model has not answered for %g s", self._batcher.running_seconds)
                else:
                    _log.info("the model answers again")

    def _close_records(self) -> None:
        self._books.close()
        if self._tracing is not None:
            self._tracing.close()


async def serve(
    models: Model | ModelSource, config: ServiceConfig, *, on_ready: Callable[[int], None] | None = None
) -> None:
    """Serves until SIGTERM or SIGINT, then stops gracefully.

    Args:
        models: one model, as it is, or where models come from.
        config: how to serve them.
        on_ready: called with the port once calls are answered.

    Raises:
        AddressError: the port is in use, or the host is not an address of this machine.
        ConfigError: `config` does not fit a model.
        Exception: whatever the model raised at warm-up.
    """
    loop = asyncio.get_running_loop()
    asked_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    try:
        async with _running(models, config) as (server, port):
            # What is there now stays: without this, the collector looks through all of torch's objects again and again,
            # and all calls wait for it.
            gc.collect()
            gc.freeze()
            if on_ready is not None:
                on_ready(port)
            stopping, listening = asyncio.create_task(asked_to_stop.wait()), asyncio.create_task(server.listens())
            await asyncio.wait([stopping, listening], return_when=asyncio.FIRST_COMPLETED)
            if listening.done() and not stopping.done():
                stopping.cancel()
                await listening
            listening.cancel()
            _log.info("stopping")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def run(models: Model | ModelSource, config: ServiceConfig, *, on_ready: Callable[[int], None] | None = None) -> None:
    """`serve` in an event loop of its own; blocks until SIGTERM or SIGINT. For a process's main thread."""
    keep_freed_memory()
    if config.loop_cpu is not None:
        keep_to(config.loop_cpu)
    sys.setswitchinterval(_SWITCH_SECONDS)
    asyncio.run(serve(models, config, on_ready=on_ready))


@asynccontextmanager
async def serving(models: Model | ModelSource, config: ServiceConfig) -> AsyncIterator[int]:
    """A warm server in the running event loop, stopped at the end; gives its port."""
    async with _running(models, config) as (_, port):
        yield port


@contextmanager
def running_server(models: Model | ModelSource, config: ServiceConfig) -> Iterator[str]:
    """A warm server in a thread of its own, stopped at the end; gives its target, such as `127.0.0.1:50051`.

    Raises:
        AddressError, ConfigError, Exception: as `serve`.
    """
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def work() -> None:
        over = asyncio.Event()
        async with serving(models, config) as port:
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


@asynccontextmanager
async def _running(models: Model | ModelSource, config: ServiceConfig) -> AsyncIterator[tuple[Server, int]]:
    server = Server(models, config)
    try:
        port = await server.start()
        await server.warm_up()
        yield server, port
    finally:
        await server.stop()


def _quotas(what: str, per_second: float, config: ServiceConfig) -> Quotas:
    return Quotas(what, per_second, config.access.burst_seconds, config.access.max_clients)


def _blank(model: Model) -> Pixels:
    return np.zeros((model.spec.height, model.spec.width, model.spec.channels), dtype=np.uint8)


def _version() -> str:
    try:
        return importlib.metadata.version("pathguard")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
