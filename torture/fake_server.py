"""Serves the tests' fake detector, which fails on command: `python -m torture.fake_server [--steady]`.

An image whose first pixel is one of the values below makes the model do what they say; any other value is its answer.
With --steady it obeys no command: whatever goes wrong then is the server's own doing.
"""

import os
import sys
import time

import numpy as np

from detector.images import Pixels
from detector.scoring.detections import Detections
from service.config import ServiceConfig
from service.server import run
from tests.service.fakes import POISON, FakeDetector

RAISES = POISON
HANGS = 254
TAKES_ALL_MEMORY = 253
ENDS_THE_THREAD = 252

HANG_SECONDS = 4.0
SECONDS_PER_IMAGE = 0.0005
SECRET = "secret text of the model"


class FailingDetector(FakeDetector):
    """As the fake, a little slower, and with more ways to fail."""

    def detect(self, pixels: Pixels) -> Detections:
        """As the fake."""
        values = set(pixels[:, 0, 0, 0].tolist())
        if HANGS in values:
            time.sleep(HANG_SECONDS)
        if TAKES_ALL_MEMORY in values:
            np.ones(1 << 50)
        if ENDS_THE_THREAD in values:
            raise SystemExit(SECRET)
        time.sleep(SECONDS_PER_IMAGE * len(pixels))
        return super().detect(pixels)


class SteadyDetector(FakeDetector):
    """As the fake, but those values are answered like others."""

    def detect(self, pixels: Pixels) -> Detections:
        """As the fake."""
        steady = pixels.copy()
        steady[:, 0, 0, 0] %= ENDS_THE_THREAD
        return super().detect(steady)


if __name__ == "__main__":
    run(SteadyDetector() if "--steady" in sys.argv else FailingDetector(), ServiceConfig.from_environ(os.environ))
