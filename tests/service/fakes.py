"""A detector with known answers: everything it says follows from an image's first pixel."""

import asyncio
import threading
from collections.abc import Mapping

import numpy as np

from detector.errors import ArtifactError
from detector.images import ImageSpec, Pixels
from detector.interpretation.explanation import Explainer
from detector.paths.path_encoding import PathEncoding
from detector.scoring.detections import Detections
from protos.pathguard.v1 import detection_pb2 as pb

SPEC = ImageSpec(height=4, width=4, channels=3)
CLASSES = ("shirt", "shoe", "bag")
LAYERS: Mapping[str, int] = {"stage1": 6, "stage2": 5}
CALIBRATION_IMAGES = 99
POISON = 255


class FakeDetector:
    """Answers for the first pixel's red value `v`: label `v % 3`, score `v`, p-value `(v % 100 + 1) / 100`.

    A restored label is the one after the label.

    The value `POISON` makes it raise `RuntimeError("secret ...")`. While `gate` is cleared, it waits.
    """

    name = "fake"
    model_version = "model-1"
    threshold_version = "threshold-1"
    class_names = CLASSES
    layers = LAYERS
    max_false_alarm_rate = 0.05
    calibration_images = CALIBRATION_IMAGES
    restores = True
    engine = "fake"
    brief = False
    answered_in_full = 0

    def __init__(self, spec: ImageSpec = SPEC) -> None:
        self.spec = spec
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[int] = []

    def hold(self) -> None:
        """Makes the next batch wait inside `detect` until `gate` is set."""
        self.gate.clear()
        self.entered.clear()

    async def running(self) -> None:
        """Returns when a batch is inside `detect`."""
        assert await asyncio.to_thread(self.entered.wait, 20)

    def detect(self, pixels: Pixels) -> Detections:
        """`(images, height, width, channels)` -> the answers above."""
        self.batches.append(len(pixels))
        self.entered.set()
        self.gate.wait()
        values = pixels[:, 0, 0, 0].astype(np.int64)
        if POISON in values:
            raise RuntimeError("secret text of the model")
        probabilities = np.full((len(values), len(CLASSES)), 0.25, dtype=np.float32)
        probabilities[np.arange(len(values)), values % 3] = 0.5
        return Detections(
            labels=values % 3,
            probabilities=probabilities,
            scores=values.astype(np.float64),
            p_values=(values % 100 + 1) / 100,
            paths=PathEncoding(bits_of(values), LAYERS),
        )

    def restore(self, pixels: Pixels, probabilities: np.ndarray, p_values: np.ndarray) -> np.ndarray:
        """The class after the likeliest one."""
        return np.asarray((probabilities.argmax(axis=1) + 1) % len(CLASSES), np.int64)

    def explainer(self) -> Explainer:
        """It has none."""
        raise ArtifactError("expected statistics of paths, got none; run `pathguard interpret`")


def bits_of(values: np.ndarray) -> np.ndarray:
    """The path bits that the fake answers: the value in binary, over all channels, `(images, channels)`."""
    return np.asarray((values[:, None] >> np.arange(sum(LAYERS.values()))) % 2 == 1)


def image_of(value: int, spec: ImageSpec = SPEC) -> Pixels:
    """An image whose first pixel is `value`."""
    pixels = np.zeros((spec.height, spec.width, spec.channels), dtype=np.uint8)
    pixels[0, 0, 0] = value
    return pixels


def message_of(value: int) -> pb.Image:
    """`image_of(value)` as a message of raw pixels."""
    pixels = image_of(value)
    height, width, channels = pixels.shape
    return pb.Image(raw=pb.RawPixels(pixels=pixels.tobytes(), height=height, width=width, channels=channels))


def request_for(*values: int) -> pb.DetectRequest:
    """A request with one image for each value."""
    return pb.DetectRequest(images=[message_of(value) for value in values])
