"""The client for asyncio."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

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


class AsyncClient:
    """`Client` for asyncio, with the same methods; an async context manager."""

    def __init__(
        self,
        target: str,
        *,
        access: Access = NO_ACCESS,
        wait_for_ready: bool = False,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """As `Client`; needs a running event loop."""
        self.target = target
        self._wait_for_ready = wait_for_ready
        self._max_message_bytes = max_message_bytes
        self._metadata = access.metadata
        credentials, settings = access.credentials(target), options(max_message_bytes)
        self._channel = (
            grpc.aio.insecure_channel(target, options=settings)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=settings)
        )
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
        model_version: str = "",
        max_false_alarm_rate: float | None = None,
        include_path: bool = False,
        uncertain_rate: float | None = None,
        correct: bool = False,
        explain: bool = False,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> list[ImageResult]:
        """As `Client.detect`."""
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
            answered = await self._call(self._stub.Detect, request, timeout_seconds) if part.messages else None
            results += part.results(answered)
        return results

    async def detect_stream(
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
    ) -> AsyncIterator[tuple[int, ImageResult]]:
        """As `Client.detect_stream`; images are read on the event loop."""
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
            call: Any = self._stub.DetectStream(
                sender.messages(), wait_for_ready=self._wait_for_ready, metadata=self._metadata
            )
            try:
                while True:
                    async with asyncio.timeout(timeout_seconds):
                        message = await call.read()
                    results = feed.ended() if message is grpc.aio.EOF else feed.answered(message)
                    sender.changed.set()
                    for result in results:
                        yield result
                    if message is grpc.aio.EOF:
                        break
                if sender.error is not None:
                    raise sender.error
            except TimeoutError:
                raise TimedOutError(f"no answer from {self.target} within {timeout_seconds:g} s") from None
            except grpc.RpcError as error:
                sender.stop()  # gRPC's task may still ask, and would send into the lost call
                pause = feed.again() if await call.code() is grpc.StatusCode.UNAVAILABLE else None
                if pause is None:
                    raise error_of(error, self.target, timeout_seconds) from None
                await asyncio.sleep(pause)
            finally:
                call.cancel()

    async def models(self, *, timeout_seconds: float = TIMEOUT_SECONDS) -> tuple[ModelInfo, ...]:
        """As `Client.models`."""
        response = await self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_seconds)
        return tuple(model_info(model) for model in response.models)

    async def ready(self, *, timeout_seconds: float = 3.0) -> bool:
        """As `Client.ready`."""
        check: Any = self._channel.unary_unary(HEALTH_CHECK)
        try:
            answer = await check(ANY_SERVICE, timeout=timeout_seconds, wait_for_ready=self._wait_for_ready)
        except grpc.RpcError:
            return False
        return bool(answer == SERVING)

    async def _call(self, method: Any, request: Any, timeout_seconds: float) -> Any:
        check_timeout(timeout_seconds)
        try:
            return await method(
                request, timeout=timeout_seconds, wait_for_ready=self._wait_for_ready, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_of(error, self.target, timeout_seconds) from None


class _Sender:
    """The messages of a feed, as gRPC takes them: waits while too many are under way."""

    def __init__(self, feed: Feed) -> None:
        self.error: ClientError | None = None
        self.changed = asyncio.Event()
        self._feed = feed
        self._stopped = False

    def stop(self) -> None:
        """Gives nothing more."""
        self._stopped = True
        self.changed.set()

    async def messages(self) -> AsyncIterator[pb.DetectStreamRequest]:
        """What is to be sent."""
        while True:
            while self._feed.waiting >= MESSAGES_UNDER_WAY and not self._stopped:
                self.changed.clear()
                await self.changed.wait()
            if self._stopped:
                return
            try:
                message = self._feed.take()
            except ClientError as error:
                # Told by whoever waits for answers: gRPC would only write it into a log.
                self.error = error
                return
            if message is None:
                return
            yield message
