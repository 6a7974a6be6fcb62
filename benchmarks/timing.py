"""Times of several calls, taken in turns, so that what slows the machine down slows all of them."""

import time
from collections.abc import Callable, Sequence

import numpy as np


def interleaved(calls: Sequence[Callable[[], object]], repetitions: int, warm_up: int = 3) -> list[float]:
    """Median seconds of each call.

    Args:
        calls: made in turns.
        repetitions: of each.
        warm_up: how many more of each come first and are not counted.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for repetition in range(repetitions + warm_up):
        for call, times in zip(calls, taken, strict=True):
            began = time.perf_counter()
            call()
            if repetition >= warm_up:
                times.append(time.perf_counter() - began)
    return [float(np.median(times)) for times in taken]
