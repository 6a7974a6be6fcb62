"""The client for programs with threads, or with just one."""

import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from pathguard.client.connection import (
    ANY_SERVICE,
    HEALTH_CHECK,
    NO_ACCESS,
    SERVING,
    TIMEOUT_SECONDS,
    Access,
    check_timeout,
    options,
)
from pathguard.client.errors import ClientError, TimedOutError, error_of
from pathguard.client.feed import IMAGES_PER_MESSAGE, MESSAGES_UNDER_WAY, Feed
from pathguard.client.requests import MAX_MESSAGE_BYTES, ImageInput, Options, split
from pathguard.client.results import ImageResult, ModelInfo, model_info
from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub


class Client:
    """Talks to one server over one connection; may be shared by threads. A context manager.

    Calls that find the server unavailable are tried up to five times within some two seconds.
    """

    def __init__(
        self,
        target: str,
        *,
        access: Access = NO_ACCESS,
        wait_for_ready: bool = False,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Connects at the first call.

        Args:
            target: the server's `HOST:PORT`.
            access: encryption, and who is calling.
            wait_for_ready: whether calls wait, up to their timeout, for a server that cannot be reached yet or again.
            max_message_bytes: the server's limit; what is larger is split over several calls.

        Raises:
            InputError: as `Access.credentials`.
        """
        self.target = target
        self._wait_for_ready = wait_for_ready
        self._max_message_bytes = max_message_bytes
        self._metadata = access.metadata
        credentials, settings = access.credentials(target), options(max_message_bytes)
        self._channel = (
            grpc.insecure_channel(target, options=settings)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=settings)
        )
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
        model_version: str = "",
        max_false_alarm_rate: float | None = None,
        include_path: bool = False,
        uncertain_rate: float | None = None,
        correct: bool = False,
        explain: bool = False,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> list[ImageResult]:
        """One result for each image, in order; an image that cannot be read or answered carries its own error.

        Args:
            images: any number; split over calls of at most 1,024 images and `max_message_bytes`.
            model: name of the model; empty for the server's default.
            model_version: its version; empty for the one that the server uses.
            max_false_alarm_rate: largest share of clean images that may be called adversarial; None for the model's.
            include_path: whether results carry their calculation paths.
            uncertain_rate: images with a p-value above `max_false_alarm_rate` but not above this are called uncertain;
                None for none.
            correct: whether the labels of images that are called adversarial are restored, where the model can do that.
            explain: whether results carry their explanations, likewise; calls have at most 16 images then.
            timeout_seconds: longest time for each call, above 0.

        Raises:
            ClientError: a call failed; one of the kinds in `pathguard.client.errors`.
        """
        chosen = Options(
            model=model,
            model_version=model_version,
            max_false_alarm_rate=max_false_alarm_rate,
            include_path=include_path,
            uncertain_rate=uncertain_rate,
            correct=correct,
            explain=explain,
        )
        results: list[ImageResult] = []
        for part in split(images, self._max_message_bytes, chosen.images_per_call):
            request = chosen.request(part.messages)
            answered = self._call(self._stub.Detect, request, timeout_seconds) if part.messages else None
            results += part.results(answered)
        return results

    def detect_stream(
        self,
        images: Iterable[ImageInput],
        *,
        model: str = "",
        model_version: str = "",
        max_false_alarm_rate: float | None = None,
        include_path: bool = False,
        uncertain_rate: float | None = None,
        correct: bool = False,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> Iterator[tuple[int, ImageResult]]:
        """The position of each image and its result, as they are ready: for more images than one wants to wait for.

        Images are read and sent while earlier ones are answered, a bounded number ahead. After a lost connection, what
        has no answer is sent again.

        Args:
            images: any number; read in another thread.
            model: as for `detect`; likewise the next four.
            model_version: see above.
            max_false_alarm_rate: see above.
            include_path: see above.
            uncertain_rate: see above.
            correct: see above.
            timeout_seconds: longest time without any answer, above 0.

        Raises:
            ClientError: the stream failed; one of the kinds in `pathguard.client.errors`.
        """
        check_timeout(timeout_seconds)
        chosen = Options(
            model=model,
            model_version=model_version,
            max_false_alarm_rate=max_false_alarm_rate,
            include_path=include_path,
            uncertain_rate=uncertain_rate,
            correct=correct,
        )
        feed = Feed(split(images, self._max_message_bytes, IMAGES_PER_MESSAGE), chosen)
        while not feed.done:
            sender = _Sender(feed)
            call: Any = self._stub.DetectStream(sender, wait_for_ready=self._wait_for_ready, metadata=self._metadata)
            try:
                yield from _answers(call, sender, timeout_seconds, self.target)
            except grpc.RpcError as error:
                sender.stop()  # gRPC's thread may still ask, and would send into the lost call
                pause = feed.again() if call.code() is grpc.StatusCode.UNAVAILABLE else None
                if pause is None:
                    raise error_of(error, self.target, timeout_seconds) from None
                time.sleep(pause)
            finally:
                sender.stop()
                call.cancel()

    def models(self, *, timeout_seconds: float = TIMEOUT_SECONDS) -> tuple[ModelInfo, ...]:
        """The models that the server answers for, its default first.

        Raises:
            ClientError: the call failed.
        """
        response = self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_seconds)
        return tuple(model_info(model) for model in response.models)

    def ready(self, *, timeout_seconds: float = 3.0) -> bool:
        """Whether the server answers and is warm."""
        check: Any = self._channel.unary_unary(HEALTH_CHECK)
        try:
            return bool(check(ANY_SERVICE, timeout=timeout_seconds, wait_for_ready=self._wait_for_ready) == SERVING)
        except grpc.RpcError:
            return False

    def _call(self, method: Any, request: Any, timeout_seconds: float) -> Any:
        check_timeout(timeout_seconds)
        try:
            return method(
                request, timeout=timeout_seconds, wait_for_ready=self._wait_for_ready, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_of(error, self.target, timeout_seconds) from None


def check_health(target: str, timeout_seconds: float = 3.0, access: Access = NO_ACCESS) -> bool:
    """Whether a server answers at `target` and is warm: what a container's health check asks."""
    with Client(target, access=access) as client:
        return client.ready(timeout_seconds=timeout_seconds)


class _Sender:
    """The messages of a feed, as gRPC's own thread takes them: waits while too many are under way."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.error: ClientError | None = None
        self.changed = threading.Condition()
        self._stopped = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> pb.DetectStreamRequest:
        with self.changed:
            self.changed.wait_for(lambda: self._stopped or self.feed.waiting < MESSAGES_UNDER_WAY)
            if not self._stopped:
                try:
                    message = self.feed.take()
                except ClientError as error:
                    # Told by the thread that waits for answers: an error here would only be a line in a log.
                    self.error = error
                    message = None
                if message is not None:
                    return message
            raise StopIteration

    def stop(self) -> None:
        """Gives nothing more."""
        with self.changed:
            self._stopped = True
            self.changed.notify_all()


def _answers(call: Any, sender: _Sender, timeout_seconds: float, target: str) -> Iterator[tuple[int, ImageResult]]:
    """What comes back, until all has; the call is cancelled when nothing comes for too long."""
    late = threading.Event()

    def cancel() -> None:
        late.set()
        call.cancel()

    while True:
        timer = threading.Timer(timeout_seconds, cancel)
        timer.daemon = True
        timer.start()
        try:
            message = next(call, None)
        except grpc.RpcError:
            if late.is_set():
                raise TimedOutError(f"no answer from {target} within {timeout_seconds:g} s") from None
            raise
        finally:
            timer.cancel()
        with sender.changed:
            results = sender.feed.ended() if message is None else sender.feed.answered(message)
            sender.changed.notify_all()
        yield from results
        if message is None:
            break
    if sender.error is not None:
        raise sender.error
