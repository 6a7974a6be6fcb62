"""Clients of a running server, sync and async: images in, labels and verdicts out. Needs no torch.

ClientError
├── InputError          what was given is not an image, or a setting is out of range
├── UnreachableError    no server answers, or it is warming up or stopping
├── RefusedError        the server does not take the request, or does not know the model
├── OverloadedError     the server has too much work; says when to try again
├── TimedOutError       no answer in time
└── ServerError         the server failed
"""

import enum
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub

ImageInput = bytes | Path | npt.NDArray[np.uint8]
"""An image file's bytes, its path, or `uint8` pixels `(height, width, 1 or 3)`."""

MAX_IMAGES_PER_CALL = 1024
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
TIMEOUT_SECONDS = 30.0

DETAILS_KEY = "grpc-status-details-bin"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"

# `HealthCheckRequest()` and `HealthCheckResponse(status=SERVING)` on the wire: the client does without the package
# that only a server needs.
_ANY_SERVICE = b""
_SERVING = b"\x08\x01"

# What an image costs in a message beside its pixels: tags, lengths, height, width and channels.
_IMAGE_OVERHEAD_BYTES = 64
_REQUEST_OVERHEAD_BYTES = 4096

_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "pathguard.v1.DetectionService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


class ClientError(Exception):
    """Base of every error that the client raises on purpose; its text is one line for a person."""


class InputError(ClientError):
    """What was given is not an image, or a setting is out of range."""


class UnreachableError(ClientError):
    """No server answers, or it is warming up or stopping; tried several times."""


class RefusedError(ClientError):
    """The server does not take the request, or does not know the model."""


class OverloadedError(ClientError):
    """The server has too much work.

    Attributes:
        retry_after_seconds: when there is likely to be room; None if the server did not say.
    """

    def __init__(self, message: str, retry_after_seconds: float | None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class TimedOutError(ClientError):
    """No answer in time."""


class ServerError(ClientError):
    """The server failed; its log says more under the id in the message."""


class Verdict(enum.Enum):
    """Whether an image was altered to mislead the network."""

    UNSPECIFIED = 0
    CLEAN = 1
    ADVERSARIAL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """What the server says about one image.

    Attributes:
        label: predicted class, from 0; None with an error.
        name: name of the predicted class; None with an error.
        probabilities: softmax over the classes, each in [0, 1]; empty with an error.
        score: adversarial score, unbounded, larger is more suspicious; None with an error.
        p_value: share of clean calibration images at least as suspicious, in (0, 1]; None with an error.
        verdict: the decision at `max_false_alarm_rate`; UNSPECIFIED with an error.
        path: layer -> its open channels, `(channels,)`; None unless asked for.
        resized: whether the server resized the image to the network's size.
        error: why there is no answer for this image, in one line; None if there is one.
        model_version: version of the network and classifier that answered; empty if the server never saw the image.
        threshold_version: version of the calibration; empty likewise.
        max_false_alarm_rate: rate that the verdict was given at, in (0, 1); None if the server never saw the image.
    """

    label: int | None = None
    name: str | None = None
    probabilities: tuple[float, ...] = ()
    score: float | None = None
    p_value: float | None = None
    verdict: Verdict = Verdict.UNSPECIFIED
    path: Mapping[str, npt.NDArray[np.bool_]] | None = None
    resized: bool = False
    error: str | None = None
    model_version: str = ""
    threshold_version: str = ""
    max_false_alarm_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that the server answers for.

    Attributes:
        name: what to ask for it by.
        model_version: version of the network and classifier.
        threshold_version: version of the calibration.
        height: rows of pixels that it takes.
        width: columns of pixels that it takes.
        channels: 1 (grey) or 3 (RGB).
        resize: whether images of another size are resized rather than refused.
        class_names: names of the classes, by label.
        layers: gated layer -> its channels, in the order of the path.
        max_false_alarm_rate: default rate, in (0, 1).
        smallest_false_alarm_rate: smallest rate that can be asked for.
        calibration_images: number of clean images that p-values are counted on.
    """

    name: str
    model_version: str
    threshold_version: str
    height: int
    width: int
    channels: int
    resize: bool
    class_names: tuple[str, ...]
    layers: Mapping[str, int]
    max_false_alarm_rate: float
    smallest_false_alarm_rate: float
    calibration_images: int


class Client:
    """Talks to one server over one connection; may be shared by threads. A context manager.

    Calls that find the server unavailable are tried up to four times within about a second.
    """

    def __init__(
        self, target: str, *, wait_for_ready: bool = False, max_message_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        """Connects at the first call.

        Args:
            target: the server's `HOST:PORT`.
            wait_for_ready: whether calls wait, up to their timeout, for a server that cannot be reached yet.
            max_message_bytes: the server's limit; what is larger is split over several calls.
        """
        self.target = target
        self._wait_for_ready = wait_for_ready
        self._max_message_bytes = max_message_bytes
        self._channel = grpc.insecure_channel(target, options=_options(max_message_bytes))
        self._stub = DetectionServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def detect(
        self,
        images: Iterable[ImageInput],
        *,
        model: str = "",
        max_false_alarm_rate: float | None = None,
        include_path: bool = False,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> list[ImageResult]:
        """One result for each image, in order; an image that cannot be read or answered carries its own error.

        Args:
            images: any number; split over calls of at most 1,024 images and `max_message_bytes`.
            model: name of the model; empty for the server's default.
            max_false_alarm_rate: largest share of clean images that may be called adversarial; None for the model's.
            include_path: whether results carry their calculation paths.
            timeout_seconds: longest time for each call, above 0.

        Raises:
            ClientError: a call failed; one of the kinds in this module's docstring.
        """
        results: list[ImageResult] = []
        for part in split(images, self._max_message_bytes):
            request = request_of(part.messages, model, max_false_alarm_rate, include_path)
            answered = self._call(self._stub.Detect, request, timeout_seconds) if part.messages else None
            results += part.results(answered)
        return results

    def models(self, *, timeout_seconds: float = TIMEOUT_SECONDS) -> tuple[ModelInfo, ...]:
        """The models that the server answers for, its default first.

        Raises:
            ClientError: the call failed.
        """
        response = self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_seconds)
        return tuple(_model_info(model) for model in response.models)

    def ready(self, *, timeout_seconds: float = 3.0) -> bool:
        """Whether the server answers and is warm."""
        check: Any = self._channel.unary_unary(HEALTH_CHECK)
        try:
            return bool(check(_ANY_SERVICE, timeout=timeout_seconds, wait_for_ready=self._wait_for_ready) == _SERVING)
        except grpc.RpcError:
            return False

    def _call(self, method: Any, request: Any, timeout_seconds: float) -> Any:
        _check_timeout(timeout_seconds)
        try:
            return method(request, timeout=timeout_seconds, wait_for_ready=self._wait_for_ready)
        except grpc.RpcError as error:
            raise error_of(error, self.target, timeout_seconds) from None


class AsyncClient:
    """`Client` for asyncio, with the same methods; an async context manager."""

    def __init__(
        self, target: str, *, wait_for_ready: bool = False, max_message_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        """As `Client`; needs a running event loop."""
        self.target = target
        self._wait_for_ready = wait_for_ready
        self._max_message_bytes = max_message_bytes
        self._channel = grpc.aio.insecure_channel(target, options=_options(max_message_bytes))
        self._stub = DetectionServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def detect(
        self,
        images: Iterable[ImageInput],
        *,
        model: str = "",
        max_false_alarm_rate: float | None = None,
        include_path: bool = False,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> list[ImageResult]:
        """As `Client.detect`."""
        results: list[ImageResult] = []
        for part in split(images, self._max_message_bytes):
            request = request_of(part.messages, model, max_false_alarm_rate, include_path)
            answered = await self._call(self._stub.Detect, request, timeout_seconds) if part.messages else None
            results += part.results(answered)
        return results

    async def models(self, *, timeout_seconds: float = TIMEOUT_SECONDS) -> tuple[ModelInfo, ...]:
        """As `Client.models`."""
        response = await self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_seconds)
        return tuple(_model_info(model) for model in response.models)

    async def ready(self, *, timeout_seconds: float = 3.0) -> bool:
        """As `Client.ready`."""
        check: Any = self._channel.unary_unary(HEALTH_CHECK)
        try:
            answer = await check(_ANY_SERVICE, timeout=timeout_seconds, wait_for_ready=self._wait_for_ready)
        except grpc.RpcError:
            return False
        return bool(answer == _SERVING)

    async def _call(self, method: Any, request: Any, timeout_seconds: float) -> Any:
        _check_timeout(timeout_seconds)
        try:
            return await method(request, timeout=timeout_seconds, wait_for_ready=self._wait_for_ready)
        except grpc.RpcError as error:
            raise error_of(error, self.target, timeout_seconds) from None


def check_health(target: str, timeout_seconds: float = 3.0) -> bool:
    """Whether a server answers at `target` and is warm: what a container's health check asks."""
    with Client(target) as client:
        return client.ready(timeout_seconds=timeout_seconds)


@dataclass(frozen=True, slots=True)
class Part:
    """The images of one call.

    Attributes:
        messages: the images that go to the server.
        problems: for every image of the part, why it does not go to the server, or None if it does.
    """

    messages: Sequence[pb.Image]
    problems: Sequence[str | None]

    def results(self, response: pb.DetectResponse | None) -> list[ImageResult]:
        """One result for every image of the part; `response` is None if none went to the server."""
        answers = iter(() if response is None else _results_of(response))
        return [next(answers) if problem is None else ImageResult(error=problem) for problem in self.problems]


def split(images: Iterable[ImageInput], max_message_bytes: int) -> Iterator[Part]:
    """Parts of at most 1,024 images and `max_message_bytes`; files are read when their part is made.

    Raises:
        InputError: something is neither bytes, nor a path, nor `uint8` pixels.
    """
    if isinstance(images, bytes | bytearray | str | Path | np.ndarray):
        raise InputError(f"expected several images, such as a list, got one {type(images).__name__}")
    messages: list[pb.Image] = []
    problems: list[str | None] = []
    limit, size = max_message_bytes - _REQUEST_OVERHEAD_BYTES, 0
    for image in images:
        message = _message_of(image)
        if isinstance(message, pb.Image) and message.ByteSize() + _IMAGE_OVERHEAD_BYTES > limit:
            message = f"expected an image of less than {limit} bytes, got {message.ByteSize()}"
        more = message.ByteSize() + _IMAGE_OVERHEAD_BYTES if isinstance(message, pb.Image) else 0
        if len(problems) == MAX_IMAGES_PER_CALL or size + more > limit:
            yield Part(messages, problems)
            messages, problems, size = [], [], 0
        if isinstance(message, pb.Image):
            messages.append(message)
            size += more
        problems.append(message if isinstance(message, str) else None)
    if problems:
        yield Part(messages, problems)


def request_of(
    messages: Sequence[pb.Image],
    model: str = "",
    max_false_alarm_rate: float | None = None,
    include_path: bool = False,
) -> pb.DetectRequest:
    """The request for `messages`."""
    return pb.DetectRequest(
        images=messages, model=model, max_false_alarm_rate=max_false_alarm_rate, include_path=include_path
    )


def error_of(error: grpc.RpcError, target: str, timeout_seconds: float) -> ClientError:
    """What a failed call means, in one line."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code, text = error.code(), " ".join((error.details() or "").split())
    status = _status_in(error)
    if code is grpc.StatusCode.UNAVAILABLE and status is None:
        # gRPC's own words: "failed to connect to all addresses; last error: ...: Connection refused (111)"
        return UnreachableError(f"no server answers at {target}: {text.rpartition(': ')[2] or 'connection lost'}")
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnreachableError(f"the server at {target} is not ready: {text}")
    if code in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
    ):
        return RefusedError(f"the server at {target} refused the call: {text}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return OverloadedError(f"the server at {target} takes no more: {text}", _retry_after(status))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOutError(f"no answer from {target} within {timeout_seconds:g} s")
    return ServerError(f"the server at {target} failed: {text or code.name}")


def _options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.service_config", json.dumps(_RETRIES)),
        # gRPC keeps a request for retries only up to 256 KiB; a larger one would fail at the first broken connection.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]


def _check_timeout(timeout_seconds: float) -> None:
    if not timeout_seconds > 0:
        raise InputError(f"expected a timeout above 0 s, got {timeout_seconds}")


def _message_of(image: ImageInput) -> pb.Image | str:
    """The message of `image`, or why it cannot be read."""
    if isinstance(image, Path):
        try:
            return pb.Image(encoded=image.read_bytes())
        except OSError as error:
            return f"expected a file that can be read, got {image}: {error.strerror or error}"
    if isinstance(image, bytes | bytearray | memoryview):
        return pb.Image(encoded=bytes(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise InputError(f"expected uint8 pixels (height, width, channels), got {image.dtype} {image.shape}")
        height, width, channels = image.shape
        return pb.Image(raw=pb.RawPixels(pixels=image.tobytes(), height=height, width=width, channels=channels))
    raise InputError(f"expected an image as bytes, a pathlib.Path or a uint8 array, got {type(image).__name__}")


def _results_of(response: pb.DetectResponse) -> Iterator[ImageResult]:
    layers = {layer.name: layer.channels for layer in response.path_layout.layers}
    for result in response.results:
        failed = result.status.code != 0
        yield ImageResult(
            label=None if failed else result.label,
            name=None if failed else result.label_name,
            probabilities=tuple(result.probabilities),
            score=None if failed else result.score,
            p_value=None if failed else result.p_value,
            verdict=Verdict(result.verdict),
            path=_path_of(result.path, layers) if layers and not failed else None,
            resized=result.resized,
            error=result.status.message if failed else None,
            model_version=response.model_version,
            threshold_version=response.threshold_version,
            max_false_alarm_rate=response.max_false_alarm_rate,
        )


def _path_of(packed: bytes, layers: Mapping[str, int]) -> dict[str, npt.NDArray[np.bool_]]:
    ends = list(itertools.accumulate(layers.values()))
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=ends[-1]).astype(np.bool_)
    return dict(zip(layers, np.split(bits, ends[:-1]), strict=True))


def _model_info(model: pb.Model) -> ModelInfo:
    return ModelInfo(
        name=model.name,
        model_version=model.model_version,
        threshold_version=model.threshold_version,
        height=model.input.height,
        width=model.input.width,
        channels=model.input.channels,
        resize=model.input.resize,
        class_names=tuple(model.class_names),
        layers={layer.name: layer.channels for layer in model.path_layout.layers},
        max_false_alarm_rate=model.max_false_alarm_rate,
        smallest_false_alarm_rate=model.smallest_false_alarm_rate,
        calibration_images=model.calibration_images,
    )


def _status_in(error: Any) -> Status | None:
    """The `google.rpc.Status` that our server sends with every error; None if gRPC itself made the error."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            return Status.FromString(value)
    return None


def _retry_after(status: Status | None) -> float | None:
    for detail in () if status is None else status.details:
        info = RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None
