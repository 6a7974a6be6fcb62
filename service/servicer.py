"""The RPCs of `pathguard.v1.DetectionService`: decode, ask, encode."""

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.rpc.status_pb2 import Status

from detector.images import DecodedImage, Pixels
from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceServicer
from service.batching import MicroBatcher
from service.config import ServiceConfig
from service.errors import UnknownModelError, status_of
from service.lifecycle import Lifecycle
from service.messages import check_request, decode_image, field_of, is_encoded, model_message, response_of
from service.model import Answer, Model

Context = grpc.aio.ServicerContext[Any, Any]

# Images in one job of a decoding thread: few enough that a large request leaves room for others in between.
DECODE_TOGETHER = 16


class DetectionServicer(DetectionServiceServicer):
    """Answers calls about one model. Errors are raised; the outermost interceptor makes them statuses."""

    def __init__(
        self,
        model: Model,
        batcher: MicroBatcher[Pixels, Answer],
        decoders: ThreadPoolExecutor,
        lifecycle: Lifecycle,
        config: ServiceConfig,
    ) -> None:
        """Wires the parts; needs a running event loop."""
        self._model = model
        self._batcher = batcher
        self._decoders = decoders
        self._lifecycle = lifecycle
        self._config = config
        self._pixels_per_image = model.spec.height * model.spec.width * model.spec.channels
        self._loop = asyncio.get_running_loop()

    async def Detect(self, request: pb.DetectRequest, context: Context) -> pb.DetectResponse:
        """Classifies and checks the images of one call."""
        with self._lifecycle.call():
            model = self._named(request.model)
            rate = check_request(request, model, self._config.max_images_per_request)
            count, remaining = len(request.images), context.time_remaining()
            deadline = None if remaining is None else self._loop.time() + remaining
            with self._batcher.admit(count, count * self._pixels_per_image, deadline):
                decoded = await self._decode(request.images)
                good = [image.pixels for image in decoded if isinstance(image, DecodedImage)]
                answers = await self._batcher.submit(good, deadline) if good else []
            _raise_if_none_was_answered(answers)
            return response_of(_results(request, decoded, answers), model, rate, request.include_path)

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: Context,
    ) -> pb.ListModelsResponse:
        """All models of this server."""
        return pb.ListModelsResponse(models=[model_message(self._model)])

    async def GetModel(
        self,
        request: pb.GetModelRequest,
        context: Context,
    ) -> pb.GetModelResponse:
        """One model by name."""
        return pb.GetModelResponse(model=model_message(self._named(request.name)))

    def _named(self, name: str) -> Model:
        if name and name != self._model.name:
            raise UnknownModelError(f"expected a model that this server has ({self._model.name}), got {name!r}")
        return self._model

    async def _decode(self, images: Sequence[pb.Image]) -> list[DecodedImage | Exception]:
        # Raw pixels cost less than the way to another thread and back. Files never are decoded here, however small:
        # a few kilobytes can hold millions of pixels, and every other call would wait for them.
        if not any(is_encoded(image) for image in images) and not self._model.spec.resize:
            return self._decode_here(images)
        parts = [images[start : start + DECODE_TOGETHER] for start in range(0, len(images), DECODE_TOGETHER)]
        jobs = [self._loop.run_in_executor(self._decoders, self._decode_here, part) for part in parts]
        decoded = [await jobs[0]] if len(jobs) == 1 else await asyncio.gather(*jobs)
        return list(itertools.chain.from_iterable(decoded))

    def _decode_here(self, images: Sequence[pb.Image]) -> list[DecodedImage | Exception]:
        return [self._decoded_or_error(image) for image in images]

    def _decoded_or_error(self, image: pb.Image) -> DecodedImage | Exception:
        try:
            return decode_image(image, self._model.spec, self._config.max_pixels)
        # Whatever it is, it is about this image, and its neighbours are answered.
        except Exception as error:
            return error


def _raise_if_none_was_answered(answers: Sequence[Answer | BaseException]) -> None:
    """A model that fails for all images of a call fails the call, so that callers and monitors see it."""
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    if errors and len(errors) == len(answers):
        raise errors[0]


def _results(
    request: pb.DetectRequest, decoded: Sequence[DecodedImage | Exception], answers: Sequence[Answer | BaseException]
) -> list[tuple[Answer, bool] | Status]:
    """For each image its answer and whether it was resized, or its status."""
    rest = iter(answers)
    results: list[tuple[Answer, bool] | Status] = []
    for position, image in enumerate(decoded):
        outcome = next(rest) if isinstance(image, DecodedImage) else image
        if isinstance(outcome, BaseException):
            results.append(status_of(outcome, field_of(request.images[position], position)))
        else:
            results.append((outcome, isinstance(image, DecodedImage) and image.resized))
    return results
