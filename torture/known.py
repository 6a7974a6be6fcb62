"""Images whose answers are known: what the detector says about them offline, or what the fake one has to say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detector.bundle import Bundle
from detector.images import Pixels, encode_png
from detector.scoring.detector import Detector
from protos.pathguard.v1 import detection_pb2 as pb
from tests.service.fakes import CLASSES, message_of

IMAGES = 256
BAD_FILE = b"\x89PNG\r\n\x1a\n this is no image"


@dataclass(frozen=True, slots=True)
class Known:
    """Images as messages, with their answers.

    Attributes:
        raw: each as raw pixels.
        encoded: each as a PNG file.
        labels: `(images,)`.
        probabilities: `(images, classes)`.
        scores: `(images,)`.
        p_values: `(images,)`.
    """

    raw: Sequence[pb.Image]
    encoded: Sequence[pb.Image]
    labels: np.ndarray
    probabilities: np.ndarray
    scores: np.ndarray
    p_values: np.ndarray

    def problem(self, result: pb.ImageResult, index: int) -> str | None:
        """What is wrong with the server's answer about image `index`; None if nothing."""
        if result.status.code:
            return f"image {index}: {result.status.message}"
        same = (
            result.label == self.labels[index]
            and np.allclose(result.probabilities, self.probabilities[index], atol=1e-4)
            and np.isclose(result.score, self.scores[index], rtol=1e-4, atol=1e-4)
            # A score that moves by a rounding error may pass one calibration image.
            and abs(result.p_value - self.p_values[index]) < 2e-3
        )
        return None if same else f"image {index}: the answer of another image"


def known_of(bundle: Path, count: int = IMAGES) -> Known:
    """Noise of several strengths around plain surfaces, seed 0, with the answers of the bundle's detector."""
    detector = Detector(Bundle(bundle))
    spec = detector.spec
    random = np.random.default_rng(0)
    shape = (count, spec.height, spec.width, spec.channels)
    level, strength = random.uniform(0, 255, (count, 1, 1, 1)), random.uniform(5, 120, (count, 1, 1, 1))
    pixels = np.clip(random.normal(level, strength, shape), 0, 255).astype(np.uint8)
    parts = [detector.detect(part) for part in np.array_split(pixels, max(1, count // 32))]
    return Known(
        [raw_message(image) for image in pixels],
        [pb.Image(encoded=encode_png(image)) for image in pixels],
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.p_values for part in parts]),
    )


def raw_message(pixels: Pixels) -> pb.Image:
    """`(height, width, channels)` as raw pixels."""
    height, width, channels = pixels.shape
    return pb.Image(raw=pb.RawPixels(pixels=pixels.tobytes(), height=height, width=width, channels=channels))


def known_of_fake(count: int = 200) -> Known:
    """What `torture.fake_server` has to answer to images of the values from 0 on; no torch is needed for it."""
    values = np.arange(count)
    probabilities = np.full((count, len(CLASSES)), 0.25)
    probabilities[values, values % len(CLASSES)] = 0.5
    messages = [message_of(value) for value in range(count)]
    return Known(
        messages, messages, values % len(CLASSES), probabilities, values.astype(float), (values % 100 + 1) / 100
    )
