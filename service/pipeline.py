"""The way of every image, whatever the protocol: admitted, decoded, batched, answered."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from detector.errors import ImageError
from detector.images import DecodedImage, ImageSpec
from detector.interpretation.explanation import Explanation
from service.access.callers import caller
from service.access.quotas import Quotas
from service.batching import MicroBatcher
from service.config import ServiceConfig
from service.errors import AnswerError
from service.model import Answer, Job, Model
from service.records.books import Answered, Books
from service.sources import Source
from service.statistics import Timing

# Images in one job of a decoding thread: few enough that a large request leaves room for others in between.
DECODE_TOGETHER = 16

# What is decoded on the event loop, because it costs less than the way to a thread and back: few, small files. A small
# file can hold millions of pixels, so those that say so in their header go to a thread.
_FEW_FILES = 2
_SMALL_FILE_BYTES = 16_384
_SMALL_IMAGE_PIXELS = 16_384


@dataclass(frozen=True, slots=True)
class Reply:
    """What is said about one image that was answered.

    Attributes:
        answer: the model's answer.
        resized: whether the image came in another size than the model takes.
        explanation: why; None where that was not asked for.
    """

    answer: Answer
    resized: bool
    explanation: Explanation | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the images of a call.

    Attributes:
        decoded: each image, or why it cannot be decoded.
        answers: for each decoded image the answer, or the error that the model raised even for it alone.
        timing: where the time went.
    """

    decoded: Sequence[DecodedImage | Exception]
    answers: Sequence[Answer | BaseException]
    timing: Timing

    def replies(self) -> list[Reply | BaseException]:
        """For each image of the call its reply, or why there is none."""
        rest = iter(self.answers)
        replies: list[Reply | BaseException] = []
        outcome: Answer | Reply | BaseException
        for image in self.decoded:
            outcome = next(rest) if isinstance(image, DecodedImage) else image
            if isinstance(outcome, Answer):
                outcome = Reply(outcome, isinstance(image, DecodedImage) and image.resized)
            replies.append(outcome)
        return replies

    def raise_if_the_model_failed(self) -> None:
        """A model that fails for all images that it was asked about fails the call: callers and monitors shall see it.

        Raises:
            Exception: what the model raised for the first of them.
        """
        if self.answers and not self.timing.images:
            error = next(answer for answer in self.answers if isinstance(answer, BaseException))
            # What is no Exception, such as SystemExit, would end the server and not the call.
            raise error if isinstance(error, Exception) else AnswerError(f"the model raised {type(error).__name__}")

    def raise_if_none_was_answered(self) -> None:
        """As `raise_if_the_model_failed`, and likewise where not one image could be decoded."""
        self.raise_if_the_model_failed()
        if not self.answers:
            raise next(image for image in self.decoded if isinstance(image, Exception))


class Pipeline:
    """Answers the images of a call. For the event loop's thread."""

    def __init__(
        self,
        batcher: MicroBatcher[Job, Answer],
        decoders: ThreadPoolExecutor,
        explainers: ThreadPoolExecutor,
        config: ServiceConfig,
        quota: Quotas,
        books: Books,
    ) -> None:
        """Needs a running event loop.

        Args:
            batcher: runs the images.
            decoders: threads that decode files.
            explainers: a thread for explanations, which take many times as long.
            config: limits.
            quota: how many images one client may send.
            books: where what is answered is written down.
        """
        self._batcher = batcher
        self._quota = quota
        self._books = books
        self._decoders = decoders
        self._explainers = explainers
        self._max_pixels = config.max_pixels
        self._loop = asyncio.get_running_loop()

    def deadline_in(self, seconds: float | None) -> float | None:
        """A deadline by the clock that `answers` takes; None for none."""
        return None if seconds is None else self._loop.time() + seconds

    async def answers(
        self, model: Model, rate: float, images: Sequence[Source], deadline: float | None = None, correct: bool = False
    ) -> Outcome:
        """What `model` says about `images`.

        Args:
            model: whom to ask.
            rate: the false-alarm rate that the verdicts will be given at.
            images: at least one.
            deadline: as `deadline_in` gives it.
            correct: whether the labels of images that are flagged at `rate` are restored.

        Raises:
            OverloadedError: the client sends too much, there is no room, or the deadline would pass before the images
                had been run.
            ExpiredError: the deadline passed before they had.
            UnavailableError: the server is stopping.
        """
        begin, spec = time.monotonic(), model.spec
        self._quota.take(caller().name, len(images))
        with self._batcher.admit(len(images), len(images) * spec.height * spec.width * spec.channels, deadline):
            decoded = await self._decode(images, spec)
            handed = time.monotonic()
            restore_at = rate if correct else 0.0
            jobs = [Job(model, image.pixels, restore_at) for image in decoded if isinstance(image, DecodedImage)]
            answers = await self._batcher.submit(jobs, deadline) if jobs else []
            pixels = [job.pixels for job in jobs]
            await self._books.write(Answered(model, rate, pixels, answers, len(images) - len(jobs)))
        started = min((job.started for job in jobs), default=handed)
        timing = Timing(
            images=sum(isinstance(answer, Answer) for answer in answers),
            queue=started - handed,
            decode=handed - begin,
            infer=max((job.ended for job in jobs), default=started) - started,
        )
        return Outcome(decoded, answers, timing)

    async def explained(self, model: Model, rate: float, outcome: Outcome) -> list[Reply | BaseException]:
        """The replies of an outcome with explanations; one image after another, in a thread beside the model's.

        Args:
            model: who answered.
            rate: the false-alarm rate of the verdicts.
            outcome: what it answered.

        Raises:
            ArtifactError: the model has no statistics of paths.
        """
        replies = outcome.replies()
        explainer = await self._loop.run_in_executor(self._explainers, model.explainer)
        for place, (image, reply) in enumerate(zip(outcome.decoded, replies, strict=True)):
            if isinstance(image, DecodedImage) and isinstance(reply, Reply):
                why = await self._loop.run_in_executor(self._explainers, explainer.explain, image.pixels, rate)
                replies[place] = replace(reply, explanation=why)
        return replies

    async def _decode(self, images: Sequence[Source], spec: ImageSpec) -> "list[DecodedImage | Exception]":
        files = [image.encoded_bytes for image in images if image.encoded_bytes]
        # Raw pixels cost less than the way to another thread and back.
        if not files and not spec.resize:
            return self._decode_here(images, spec, self._max_pixels)
        if len(images) <= _FEW_FILES and max(files, default=0) <= _SMALL_FILE_BYTES and not spec.resize:
            decoded = self._decode_here(images, spec, min(self._max_pixels, _SMALL_IMAGE_PIXELS))
            # One that is refused may only be too large for here.
            if not any(isinstance(image, ImageError) for image in decoded):
                return decoded
        parts = [images[start : start + DECODE_TOGETHER] for start in range(0, len(images), DECODE_TOGETHER)]
        jobs = [
            self._loop.run_in_executor(self._decoders, self._decode_here, part, spec, self._max_pixels)
            for part in parts
        ]
        rows = [await jobs[0]] if len(jobs) == 1 else await asyncio.gather(*jobs)
        return list(itertools.chain.from_iterable(rows))

    def _decode_here(
        self, images: Sequence[Source], spec: ImageSpec, max_pixels: int
    ) -> "list[DecodedImage | Exception]":
        return [_decoded_or_error(image, spec, max_pixels) for image in images]


def _decoded_or_error(image: Source, spec: ImageSpec, max_pixels: int) -> DecodedImage | Exception:
    try:
        return image.decode(spec, max_pixels)
    # Whatever it is, it is about this image, and its neighbours are answered.
    except Exception as error:
        return error
