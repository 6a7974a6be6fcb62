"""What the server asks of a detector, and the detector's answer about one image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from detector.detections import Detections
from detector.images import ImageSpec, Pixels
from service.errors import AnswerError


class Model(Protocol):
    """A fitted and calibrated detector, as the server sees it: `detector.scoring.Detector`, or a test's fake."""

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

    def detect(self, pixels: Pixels) -> Detections:
        """`uint8` `(images, height, width, channels)` -> what the network and the detector say about them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the detector says about one image.

    Attributes:
        label: predicted class, from 0.
        probabilities: softmax over the classes, each in [0, 1].
        score: adversarial score, unbounded, larger is more suspicious.
        p_value: share of clean calibration images at least as suspicious, in (0, 1].
        path: open channels of all gates, eight a byte, first channel in the highest bit.
    """

    label: int
    probabilities: Sequence[float]
    score: float
    p_value: float
    path: bytes


def ask(model: Model, images: Sequence[Pixels]) -> list[Answer]:
    """Runs `images`, each `(height, width, channels)`, through `model` together.

    Raises:
        AnswerError: a score or p-value is no number; without a check it would pass for a clean image.
    """
    detections = model.detect(np.stack(images))
    paths = detections.paths.packed()
    answers = [
        Answer(label, probabilities, score, p_value, path.tobytes())
        for label, probabilities, score, p_value, path in zip(
            detections.labels.tolist(),
            detections.probabilities.tolist(),
            detections.scores.tolist(),
            detections.p_values.tolist(),
            paths,
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
