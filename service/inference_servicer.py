"""The RPCs of the Open Inference Protocol, `inference.GRPCInferenceService`: read, ask, answer."""

from typing import Any

import grpc

from protos.inference import grpc_service_pb2 as pb
from protos.inference.grpc_service_pb2_grpc import GRPCInferenceServiceServicer
from service.access.callers import caller
from service.config import ServiceConfig
from service.errors import InvalidRequestError, UnavailableError, UnknownModelError
from service.inference_messages import (
    EXTENSIONS,
    PLATFORM,
    config_message,
    metadata_message,
    response_of,
    statistics_message,
)
from service.inference_requests import call_of
from service.lifecycle import Lifecycle
from service.model import Models
from service.pipeline import Pipeline
from service.statistics import Statistics

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(GRPCInferenceServiceServicer):
    """Answers calls. Errors are raised; the outermost interceptor makes them statuses."""

    def __init__(
        self,
        models: Models,
        pipeline: Pipeline,
        lifecycle: Lifecycle,
        config: ServiceConfig,
        statistics: Statistics,
        version: str,
    ) -> None:
        """Wires the parts; `version` is the server's."""
        self._models = models
        self._pipeline = pipeline
        self._lifecycle = lifecycle
        self._config = config
        self._statistics = statistics
        self._version = version

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Whether the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Whether requests are taken."""
        return pb.ServerReadyResponse(ready=self._lifecycle.opened)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Whether a model is there and takes requests."""
        try:
            self._models.find(request.name, request.version)
        except (UnknownModelError, UnavailableError):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._lifecycle.opened)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """What server this is."""
        return pb.ServerMetadataResponse(name=PLATFORM, version=self._version, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Inputs and outputs of a model."""
        model = self._models.find(request.name, request.version)
        versions = [other.model_version for other in self._models.all() if other.name == model.name]
        return metadata_message(model, versions)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """Labels and verdicts for the images of one request."""
        with self._lifecycle.call():
            model = self._models.find(request.model_name, request.model_version)
            call = call_of(request, model, self._config.max_images_per_request, self._config.max_pixels, caller().role)
            limits = [limit for limit in (call.timeout_seconds, context.time_remaining()) if limit is not None]
            deadline = self._pipeline.deadline_in(min(limits, default=None))
            with self._statistics.call(model) as record:
                outcome = await self._pipeline.answers(model, call.rate, call.images, deadline)
                outcome.raise_if_none_was_answered()
                record.answered(outcome.timing)
                return response_of(request, call, outcome.replies(), model)

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """How a model is served."""
        model = self._models.find(request.name, request.version)
        return pb.ModelConfigResponse(config=config_message(model, self._config))

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        """Counts and times of one model, or of all."""
        models = [self._models.find(request.name, request.version)] if request.name else self._models.all()
        return pb.ModelStatisticsResponse(
            model_stats=[statistics_message(model, self._statistics.of(model)) for model in models]
        )

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """The models of this server."""
        if request.repository_name:
            raise InvalidRequestError({"repository_name": f"expected none, got {request.repository_name[:40]!r}"})
        ready = self._lifecycle.opened
        if request.ready and not ready:
            return pb.RepositoryIndexResponse()
        state = {"state": "READY"} if ready else {"state": "UNAVAILABLE", "reason": "warming up or stopping"}
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[index(name=model.name, version=model.model_version, **state) for model in self._models.all()]
        )
