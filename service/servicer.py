"""The RPCs of `pathguard.v1.DetectionService`: read, ask, answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceServicer
from service.access.callers import caller
from service.config import ServiceConfig
from service.errors import OverloadedError
from service.feed import answer_all
from service.lifecycle import Lifecycle
from service.messages import check_request, model_message, response_of, source_of
from service.model import Models
from service.pipeline import Pipeline
from service.statistics import Statistics

Context = grpc.aio.ServicerContext[Any, Any]


class DetectionServicer(DetectionServiceServicer):
    """Answers calls. Errors are raised; the outermost interceptor makes them statuses."""

    def __init__(
        self, models: Models, pipeline: Pipeline, lifecycle: Lifecycle, config: ServiceConfig, statistics: Statistics
    ) -> None:
        """Wires the parts."""
        self._models = models
        self._pipeline = pipeline
        self._lifecycle = lifecycle
        self._config = config
        self._statistics = statistics

    async def Detect(self, request: pb.DetectRequest, context: Context) -> pb.DetectResponse:
        """Classifies and checks the images of one call."""
        with self._lifecycle.call():
            deadline = self._pipeline.deadline_in(context.time_remaining())
            return await self._answered(request, deadline, model_may_fail=False)

    async def DetectStream(
        self, requests: AsyncIterator[pb.DetectStreamRequest], context: Context
    ) -> AsyncIterator[pb.DetectStreamResponse]:
        """Classifies and checks the images of a feed, each message when it is ready."""
        with self._lifecycle.call():
            feed = answer_all(
                requests,
                self._answered_when_there_is_room,
                size=lambda message: len(message.request.images),
                limit=self._config.stream_in_flight,
                end=self._lifecycle.closing,
            )
            async with aclosing(feed) as responses:
                async for response in responses:
                    yield response

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """All models of this server."""
        return pb.ListModelsResponse(models=[model_message(model) for model in self._models.all()])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """One model by name."""
        return pb.GetModelResponse(model=model_message(self._models.find(request.name, request.version)))

    async def _answered(
        self, request: pb.DetectRequest, deadline: float | None, *, model_may_fail: bool
    ) -> pb.DetectResponse:
        model = self._models.find(request.model, request.model_version)
        role = caller().role
        rate = check_request(request, model, self._config.max_images_per_request, role)
        with self._statistics.call(model) as record:
            images = [source_of(image) for image in request.images]
            outcome = await self._pipeline.answers(model, rate, images, deadline, request.correct)
            if not model_may_fail:
                outcome.raise_if_the_model_failed()
            record.answered(outcome.timing)
            replies = await self._pipeline.explained(model, rate, outcome) if request.explain else outcome.replies()
            return response_of(request, replies, model, rate, role)

    async def _answered_when_there_is_room(self, message: pb.DetectStreamRequest) -> pb.DetectStreamResponse:
        """One message of a feed, which has no deadline of its own: it waits where a call would be refused."""
        while True:
            try:
                response = await self._answered(message.request, None, model_may_fail=True)
            except OverloadedError as error:
                await asyncio.sleep(error.retry_after_seconds)
            else:
                return pb.DetectStreamResponse(response=response)
