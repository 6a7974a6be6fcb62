"""Batches through the detector without a server, in a process of its own that works whenever it is asked to."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.server import ROOT

Rate = Callable[[float], float]


@contextmanager
def offline_process(bundle: Path, images: int, *, keeps_memory: bool) -> Iterator[Rate]:
    """A function that runs batches for so many seconds and gives the images per second.

    Args:
        bundle: whose detector.
        images: in a batch; noise, seed 0.
        keeps_memory: whether the process keeps freed memory, as the server does and a plain program does not.

    Raises:
        RuntimeError: the process ended.
    """
    command = [sys.executable, "-m", "benchmarks.offline", "--bundle", str(bundle), "--images", str(images)]
    command += ["--keep-memory"] if keeps_memory else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asks, says = process.stdin, process.stdout

        def rate(seconds: float) -> float:
            asks.write(f"{seconds}\n")
            asks.flush()
            said = says.readline()
            if not said:
                raise RuntimeError("expected images per second, got the end of the process")
            return float(said)

        try:
            yield rate
        finally:
            asks.close()
            process.wait(timeout=60)


def main() -> None:
    """Reads seconds, one a line; answers each with images per second."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--keep-memory", action="store_true")
    given = parser.parse_args()

    import torch

    from detector.bundle import Bundle
    from detector.memory import keep_freed_memory
    from detector.scoring.detector import Detector

    if given.keep_memory:
        keep_freed_memory()
    torch.set_num_threads(1)
    detector = Detector(Bundle(given.bundle))
    spec = detector.spec
    shape = (given.images, spec.height, spec.width, spec.channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    detector.detect(pixels)
    for line in sys.stdin:
        began, done = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < float(line):
            detector.detect(pixels)
            done += given.images
        print(done / took, flush=True)


if __name__ == "__main__":
    main()
