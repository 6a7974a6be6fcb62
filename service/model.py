"""What the server asks of detectors, and a detector's answer about one image."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from detector.images import ImageSpec, Pixels
from detector.interpretation.explanation import Explainer
from detector.scoring.detections import Detections
from service.errors import AnswerError, UnknownModelError


class Model(Protocol):
    """A fitted and calibrated detector as the server sees it: `scoring.detector.Detector`, or a test's fake."""

    @property
    def name(self) -> str:
        """Name that callers ask for."""

    @property
    def model_version(self) -> str:
        """Version of the network and classifier."""

    @property
    def threshold_version(self) -> str:
        """Version of the calibration."""

    @property
    def spec(self) -> ImageSpec:
        """What the network takes in."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""

    @property
    def layers(self) -> Mapping[str, int]:
        """Gate name -> its channels, in network order."""

    @property
    def max_false_alarm_rate(self) -> float:
        """Default share of clean images that may be called adversarial, in (0, 1)."""

    @property
    def calibration_images(self) -> int:
        """Number of clean images that p-values are counted on, at least 1."""

    @property
    def restores(self) -> bool:
        """Whether `restore` and `explainer` can be asked: there are statistics of paths."""

    @property
    def engine(self) -> str:
        """What runs the network, for a person."""

    @property
    def brief(self) -> bool:
        """Whether `detect` surely ends soon for one image: compiled code of a fixed number of steps, nothing else."""

    @property
    def answered_in_full(self) -> int:
        """Images so far that opened a filter which a compacted bundle is served without."""

    def detect(self, pixels: Pixels) -> Detections:
        """`uint8` `(images, height, width, channels)` -> what the network and the detector say about them."""

    def restore(
        self, pixels: Pixels, probabilities: npt.NDArray[np.float32], p_values: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64]:
        """The class that each image would have on a usual path, `(images,)`.

        Args:
            pixels: as for `detect`.
            probabilities: what `detect` said of these images, `(images, classes)`.
            p_values: likewise, `(images,)`.
        """

    def explainer(self) -> Explainer:
        """What explains single images, on a network of its own, so that no call waits for it; for any thread.

        Raises:
            ArtifactError: there are no statistics of paths.
        """


class Models(Protocol):
    """The models in service, by name and version."""

    def find(self, name: str, version: str = "") -> Model:
        """The model to ask now.

        Args:
            name: what callers know it by; empty for the default.
            version: empty for the one that calls without a version get.

        Raises:
            UnknownModelError: there is none of that name and version.
            UnavailableError: there is one, but it is not loaded yet.
        """

    def all(self) -> Sequence[Model]:
        """Every version of every model, the default first."""


@dataclass(frozen=True, slots=True)
class OneModel:
    """A server's models where there is just one."""

    model: Model

    def find(self, name: str, version: str = "") -> Model:
        """As `Models.find`."""
        if name and name != self.model.name:
            raise UnknownModelError(f"expected a model that this server has ({self.model.name}), got {name!r}")
        if version and version != self.model.model_version:
            raise UnknownModelError(
                f"expected a version of {self.model.name} that this server has ({self.model.model_version}), got "
                f"{version!r}"
            )
        return self.model

    def all(self) -> Sequence[Model]:
        """As `Models.all`."""
        return (self.model,)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the detector says about one image.

    Attributes:
        label: predicted class, from 0.
        probabilities: softmax over the classes, each in [0, 1].
        score: adversarial score, unbounded, larger is more suspicious.
        p_value: share of clean calibration images at least as suspicious, in (0, 1].
        path: open channels of all gates, eight a byte, first channel in the highest bit.
        restored: class that it would have on a usual path; None where that was not asked for.
    """

    label: int
    probabilities: Sequence[float]
    score: float
    p_value: float
    path: bytes
    restored: int | None = None


@dataclass(slots=True, eq=False)
class Job:
    """One image on its way through a model, which stays the one that the call began with.

    Attributes:
        model: whom to ask.
        pixels: `uint8` `(height, width, channels)`.
        restore_at: largest p-value at which the label is restored; 0 for never.
        started: when it was run first, by `time.monotonic`; 0 before.
        ended: when it was run last, likewise.
    """

    model: Model
    pixels: Pixels
    restore_at: float = 0.0
    started: float = 0.0
    ended: float = 0.0


def is_brief(job: Job) -> bool:
    """Whether running `job` alone surely ends soon."""
    return job.model.brief and not job.restore_at


def run_jobs(jobs: Sequence[Job]) -> list[Answer]:
    """The answers for `jobs`, in order; those of one model run together.

    Raises:
        AnswerError: as `ask`.
    """
    begin = time.monotonic()
    places: dict[int, list[int]] = {}
    for place, job in enumerate(jobs):
        job.started = job.started or begin
        places.setdefault(id(job.model), []).append(place)
    try:
        if len(places) == 1:
            return _ask_for(jobs)
        answers: dict[int, Answer] = {}
        for own in places.values():
            answers.update(zip(own, _ask_for([jobs[place] for place in own]), strict=True))
        return [answers[place] for place in range(len(jobs))]
    finally:
        end = time.monotonic()
        for job in jobs:
            job.ended = end


def _ask_for(jobs: Sequence[Job]) -> list[Answer]:
    return ask(jobs[0].model, [job.pixels for job in jobs], [job.restore_at for job in jobs])


def ask(model: Model, images: Sequence[Pixels], restore_at: Sequence[float] = ()) -> list[Answer]:
    """Runs `images`, each `(height, width, channels)`, through `model` together.

    Args:
        model: whom to ask.
        images: at least one.
        restore_at: for each image the largest p-value at which its label is restored; none for no image.

    Raises:
        AnswerError: a score or p-value is no number; without a check it would pass for a clean image.
    """
    pixels = np.stack(images)
    detections = model.detect(pixels)
    paths = detections.paths.packed()
    restored: list[int | None] = [None] * len(images)
    flagged = [place for place, at in enumerate(restore_at) if detections.p_values[place] <= at]
    if flagged:
        labels = model.restore(pixels[flagged], detections.probabilities[flagged], detections.p_values[flagged])
        for place, label in zip(flagged, labels, strict=True):
            restored[place] = int(label)
    answers = [
        Answer(label, probabilities, score, p_value, path.tobytes(), label_restored)
        for label, probabilities, score, p_value, path, label_restored in zip(
            detections.labels.tolist(),
            detections.probabilities.tolist(),
            detections.scores.tolist(),
            detections.p_values.tolist(),
            paths,
            restored,
            strict=True,
        )
    ]
    for answer in answers:
        if not (math.isfinite(answer.score) and 0 < answer.p_value <= 1):
            raise AnswerError(
                f"expected a score and a p-value in (0, 1], got score {answer.score} and p-value {answer.p_value}"
            )
    return answers


def smallest_false_alarm_rate(model: Model) -> float:
    """Smallest false-alarm rate that the calibration images can tell from 0: `1 / (calibration_images + 1)`."""
    return 1 / (model.calibration_images + 1)
