"""Prometheus metrics: calls under the names that go-grpc-prometheus made usual, and what only this service knows.

Labels never hold what a caller may choose freely, so that nobody can make the server remember ever more series: methods
are those that the server has, models those in service.
"""

import asyncio
import itertools
import logging
import threading
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import datetime
from http import HTTPStatus
from time import perf_counter
from typing import Any, Final

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from service.access.callers import caller
from service.batching import BatchRun
from service.config import MetricsConfig
from service.errors import AddressError, OverloadedError
from service.http_server import HttpServer
from service.interceptors import Context, Single, Stream, code_of
from service.records.logs import REQUEST_ID_KEY, begin_request

_log = logging.getLogger(__name__)
_calls_log = logging.getLogger("service.calls")

_CODES: Final = {code.value[0]: "".join(word.title() for word in code.name.split("_")) for code in grpc.StatusCode}
_CODES[0] = "OK"
_SCRAPE_SECONDS: Final = 10.0
_CANCELLED: Final = grpc.StatusCode.CANCELLED.value[0]

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SCORES = (-20.0, -10.0, -5.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, version: str) -> None:
        """Everything at zero; `version` is that of the program."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        method = ["grpc_type", "grpc_service", "grpc_method"]
        self.started = counter("grpc_server_started", "RPCs begun", method)
        self.handled = counter("grpc_server_handled", "RPCs ended, by status code", [*method, "grpc_code"])
        self.received = counter("grpc_server_msg_received", "Messages received", method)
        self.sent = counter("grpc_server_msg_sent", "Messages sent", method)
        self.seconds = histogram("grpc_server_handling_seconds", "Seconds until an RPC ended", method, _SECONDS)
        gauge("pathguard_build_info", "1, with the program's version", ["version"]).labels(version).set(1)
        self.serving = gauge("pathguard_serving", "1 while health says SERVING")
        self.server_restarts = counter("pathguard_server_restarts", "Times that gRPC ended its server by itself")
        self.queue_images = gauge("pathguard_queue_images", "Images taken in and not yet answered")
        self.answered_in_full = gauge(
            "pathguard_answered_in_full_images",
            "Images that opened a filter which their compacted bundle is served without; rightly answered, but slower",
        )
        self.verdicts = counter("pathguard_verdicts", "Images by verdict", ["model", "model_version", "verdict"])
        self.scores = Spread("pathguard_score", "Adversarial scores", _SCORES, self.registry)
        self.p_values = Spread("pathguard_p_value", "P-values; even where images are clean", _RATES, self.registry)
        self.batches = histogram("pathguard_batch_images", "Images in a forward pass", [], _SIZES)
        self.batch_seconds = histogram("pathguard_batch_seconds", "Seconds of a forward pass", [], _SECONDS)
        self.waits = histogram("pathguard_queue_wait_seconds", "Seconds that images waited for a batch", [], _SECONDS)
        self.failed_batches = counter("pathguard_failed_batches", "Batches in which an image failed")
        self.shed = counter("pathguard_shed", "Calls refused for load, by what there was too much of", ["reason"])
        self.models = gauge(
            "pathguard_model_info",
            "1 for each model in service, with its digests",
            ["model", "version", "model_version", "threshold_version"],
        )
        self.rates = gauge(
            "pathguard_max_false_alarm_rate", "Rate that a model flags at by default", ["model", "version"]
        )
        self.loads = counter("pathguard_model_loads", "Bundles by what became of them", ["model", "outcome"])
        self.refused_models = gauge("pathguard_model_refused", "1 while a folder's bundle is refused", ["model"])
        self.reloads = counter("pathguard_file_reloads", "Changed files by what became of them", ["file", "outcome"])
        self.certificate_end = gauge("pathguard_certificate_not_after_seconds", "When the certificate ends, Unix time")
        self.audited = counter("pathguard_audit_records", "Calls by what became of their record", ["outcome"])
        self.flagged = gauge("pathguard_flagged_share", "Share of flagged images in the last window", ["model"])
        self.drift = gauge(
            "pathguard_drift_p_value", "How probable the last window is without drift, by test", ["model", "test"]
        )
        self.drift_alarms = counter("pathguard_drift_alarms", "Windows too improbable, by test", ["model", "test"])
        self.watched = gauge("pathguard_query_watch_clients", "Clients that the query watch remembers")
        self.query_alarms = counter("pathguard_query_watch_alarms", "Series of near-identical images from one client")
        self.unwatched = counter("pathguard_records_dropped", "Images that drift and query watch had no time for")

    def _counter(self, name: str, text: str, labels: "list[str] | tuple[str, ...]" = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: "list[str] | tuple[str, ...]" = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: list[str], buckets: "tuple[float, ...]") -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def file_read(self, name: str, taken: bool) -> None:
        """Counts a changed file that was taken or refused."""
        self.reloads.labels(name, "taken" if taken else "refused").inc()

    def error_raised(self, error: BaseException) -> None:
        """Counts a call that was refused for load."""
        if isinstance(error, OverloadedError):
            self.shed.labels(error.reason).inc()

    def batch_ran(self, run: BatchRun[Any]) -> None:
        """Counts a batch that has been run."""
        self.batches.observe(len(run.items))
        self.batch_seconds.observe(run.seconds)
        for wait in run.waits:
            self.waits.observe(wait)
        if run.failed:
            self.failed_batches.inc()

    def certificate_ends(self, when: datetime) -> None:
        """Tells when the server's certificate expires."""
        self.certificate_end.set(when.timestamp())


class Spread(Collector):
    """A histogram for each model that takes many values at once, on the event loop, for a tenth of the usual cost."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        """Empty; `bounds` are the upper ends of its classes, ascending."""
        self._name, self._text, self._bounds = name, text, bounds
        self._series: dict[str, tuple[list[int], list[float]]] = {}
        registry.register(self)

    def observe(self, model: str, values: Iterable[float]) -> None:
        """Counts values of one model."""
        series = self._series.get(model)
        if series is None:
            series = self._series[model] = ([0] * (len(self._bounds) + 1), [0.0])
        counts, total = series
        for value in values:
            counts[bisect_left(self._bounds, value)] += 1
            total[0] += value

    def collect(self) -> Iterable[Metric]:
        """As Prometheus reads it."""
        family = HistogramMetricFamily(self._name, self._text, labels=["model"])
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for model, (counts, total) in list(self._series.items()):
            family.add_metric([model], list(zip(names, itertools.accumulate(counts), strict=True)), total[0])
        yield family


class CallWrapper:
    """Counts, times and, if asked to, logs each RPC, and gives it its id. Goes outermost: it sees the final status."""

    def __init__(self, metrics: Metrics, *, log_calls: bool) -> None:
        """`log_calls`: whether each call gets a record of its own."""
        self._metrics = metrics
        self._log_calls = log_calls

    def single(self, method: str, behaviour: Single) -> Single:
        """Goes around a handler that answers once; a request that comes as a stream is not counted by message."""
        books = _Books(self._metrics, method, "unary", self._log_calls)

        async def counted(request: Any, context: Context) -> Any:
            began = books.begin(context)
            code = _CANCELLED
            try:
                response = await behaviour(request, context)
                code = 0
            except asyncio.CancelledError:
                raise
            except BaseException:
                code = code_of(context)
                raise
            else:
                books.received.inc()
                books.sent.inc()
                return response
            finally:
                books.end(began, code, context)

        return counted

    def stream(self, method: str, behaviour: Stream) -> Stream:
        """Goes around a handler that answers with a stream."""
        books = _Books(self._metrics, method, "stream", self._log_calls)

        async def counted(request: Any, context: Context) -> AsyncIterator[Any]:
            began = books.begin(context)
            code = _CANCELLED
            requests = books.counting(request) if hasattr(request, "__aiter__") else request
            try:
                async for response in behaviour(requests, context):
                    books.sent.inc()
                    yield response
                code = 0
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException:
                code = code_of(context)
                raise
            finally:
                books.end(began, code, context)

        return counted


class _Books:
    """The metrics of one method, looked up once."""

    def __init__(self, metrics: Metrics, method: str, kind: str, log_calls: bool) -> None:
        service, _, name = method.lstrip("/").rpartition("/")
        labels = (kind, service, name)
        self._method = method
        self._log_calls = log_calls
        self._started = metrics.started.labels(*labels)
        self._seconds = metrics.seconds.labels(*labels)
        self._handled = metrics.handled
        self._labels = labels
        self._by_code: dict[int, Any] = {}
        self.received = metrics.received.labels(*labels)
        self.sent = metrics.sent.labels(*labels)

    def begin(self, context: Context) -> float:
        number = begin_request(context.invocation_metadata() or ())
        context.set_trailing_metadata(((REQUEST_ID_KEY, number),))
        self._started.inc()
        return perf_counter()

    def end(self, began: float, code: int, context: Context) -> None:
        seconds = perf_counter() - began
        self._seconds.observe(seconds)
        if code not in self._by_code:
            self._by_code[code] = self._handled.labels(*self._labels, _CODES.get(code, "Unknown"))
        self._by_code[code].inc()
        if self._log_calls:
            fields = {"method": self._method, "code": _CODES.get(code, "Unknown"), "seconds": round(seconds, 6)}
            _calls_log.info("call", extra={"fields": {**fields, "caller": caller().name}})

    async def counting(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            self.received.inc()
            yield request


class MetricsServer:
    """`/metrics`, and `/healthz` for probes that speak no gRPC or no TLS: plain HTTP, in threads of its own."""

    def __init__(
        self, config: MetricsConfig, registry: CollectorRegistry, healthy: Callable[[], bool] = lambda: True
    ) -> None:
        """Listens.

        Args:
            config: where.
            registry: what is told.
            healthy: whether `/healthz` answers 200 rather than 503; called from any thread.

        Raises:
            AddressError: the port is in use, or the host is not an address of this machine.
        """
        host = config.host.strip("[]")
        handler = type("_Handler", (_MetricsHandler,), {"registry": registry, "healthy": staticmethod(healthy)})
        try:
            self._server = HttpServer((host, config.port or 0), handler)
        except OSError as error:
            raise AddressError(f"expected an address for metrics, got {host}:{config.port}: {error.strerror}") from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _MetricsHandler(MetricsHandler):
    timeout = _SCRAPE_SECONDS
    healthy: Callable[[], bool]

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/healthz":
            super().do_GET()
            return
        healthy = self.healthy()
        self.send_response(HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE)
        self.end_headers()
        self.wfile.write(b"SERVING\n" if healthy else b"NOT_SERVING\n")
