"""Times of several calls, taken in turns, so that what slows the machine down slows all of them."""

import time
from collections.abc import Callable, Sequence

import numpy as np


def interleaved(calls: Sequence[Callable[[], object]], repetitions: int) -> list[float]:
    """Median seconds of each call."""
    taken: list[list[float]] = [[] for _ in calls]
    for repetition in range(repetitions + 3):
        for call, times in zip(calls, taken, strict=True):
            began = time.perf_counter()
            call()
            if repetition >= 3:  # the first ones warm up
                times.append(time.perf_counter() - began)
    return [float(np.median(times)) for times in taken]
