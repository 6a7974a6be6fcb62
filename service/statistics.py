"""How often each model was asked and where the time went, since the server started: counts that only grow."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from service.batching import BatchRun
from service.model import Job, Model


@dataclass(slots=True)
class Count:
    """How often something happened, and how many seconds it took together."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Counts once more."""
        self.count += 1
        self.seconds += seconds


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one answered call went, in seconds.

    Attributes:
        images: images that the model answered.
        queue: waiting for the model.
        decode: making pixels of what came.
        infer: from the beginning of the first batch to the end of the last one with an image of the call.
    """

    images: int
    queue: float
    decode: float
    infer: float


@dataclass(slots=True)
class ModelCounts:
    """What is counted of one version of a model.

    Attributes:
        answered: calls, from arrival to answer.
        failed: calls that ended with an error.
        queue: answered calls, as `Timing.queue`; likewise the next two.
        decode: see above.
        infer: see above.
        encode: answered calls: making the answer.
        images: images that were answered.
        batches: images in a batch -> how often, and the time of the forward pass.
        last: seconds from 1970 to the last answer; 0 before.
    """

    answered: Count = field(default_factory=Count)
    failed: Count = field(default_factory=Count)
    queue: Count = field(default_factory=Count)
    decode: Count = field(default_factory=Count)
    infer: Count = field(default_factory=Count)
    encode: Count = field(default_factory=Count)
    images: int = 0
    batches: dict[int, Count] = field(default_factory=dict)
    last: float = 0.0


class CallRecord:
    """Takes the timing of one call, when it is known."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self.timing: Timing | None = None
        self.answered_at = 0.0

    def answered(self, timing: Timing) -> None:
        """The model's part is over; what is left is making the answer."""
        self.timing = timing
        self.answered_at = time.monotonic()


class Statistics:
    """Counts for all models. For the event loop's thread."""

    def __init__(self) -> None:
        """Starts at 0."""
        self._counts: dict[tuple[str, str], ModelCounts] = {}

    def of(self, model: Model) -> ModelCounts:
        """What has been counted of `model`."""
        return self._counts.setdefault((model.name, model.model_version), ModelCounts())

    @contextmanager
    def call(self, model: Model) -> Iterator[CallRecord]:
        """Counts the call inside as answered, or as failed if it ends with an error or without an answer."""
        begin, record, counts = time.monotonic(), CallRecord(), self.of(model)
        try:
            yield record
        except BaseException:
            counts.failed.add(time.monotonic() - begin)
            raise
        end = time.monotonic()
        if record.timing is None:
            counts.failed.add(end - begin)
            return
        counts.answered.add(end - begin)
        counts.queue.add(record.timing.queue)
        counts.decode.add(record.timing.decode)
        counts.infer.add(record.timing.infer)
        counts.encode.add(end - record.answered_at)
        counts.images += record.timing.images
        counts.last = time.time()

    def batch(self, run: BatchRun[Job]) -> None:
        """Counts a batch; in one of several models, each has its share of the images and all of the time."""
        sizes: dict[tuple[str, str], int] = {}
        for job in run.items:
            key = (job.model.name, job.model.model_version)
            sizes[key] = sizes.get(key, 0) + 1
        for key, size in sizes.items():
            self._counts.setdefault(key, ModelCounts()).batches.setdefault(size, Count()).add(run.seconds)
