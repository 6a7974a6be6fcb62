"""Serves the fake detector as a process of its own: `python -m tests.service.serve_fake [PATHGUARD_...=VALUE]`.

The model takes `SECONDS_PER_BATCH`, so that calls are on their way when a signal comes.
"""

import os
import sys
import time

from detector.images import Pixels
from detector.scoring.detections import Detections
from service.config import ServiceConfig
from service.server import run
from tests.service.fakes import FakeDetector

SECONDS_PER_BATCH = 0.3


class SlowDetector(FakeDetector):
    """Takes its time once it is warm."""

    def detect(self, pixels: Pixels) -> Detections:
        """As the fake, but slow after the two batches of the warm-up."""
        if len(self.batches) >= 2:
            print("running", flush=True)
            time.sleep(SECONDS_PER_BATCH)
        return super().detect(pixels)


if __name__ == "__main__":
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    config = ServiceConfig.from_environ({"PATHGUARD_PORT": "0", "PATHGUARD_MAX_BATCH": "1", **settings})
    run(SlowDetector(), config, on_ready=lambda port: print(f"serving fake on 127.0.0.1:{port}", flush=True))
    print(f"stopped {os.getpid()}")
