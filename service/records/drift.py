"""Whether the images in service are still like those that the detector was calibrated on.

Windows of a fixed number of images are judged by two kept tests, each at a level of its own choosing:

- `share`: how probable at least so many flagged images are if each is as suspicious as a clean one. With n calibration
  scores and k = ceil((n + 1)(1 - α)) the flagged among m images are then beta-binomial, Beta(n + 1 - k, k), the law by
  which `scoring.thresholds` states the realised rate. Small when there are more attacks or stranger images than
  the allowed rate explains; it is blind to fewer.
- `p_values`: the two-sample Kolmogorov-Smirnov test of the window's p-values against the calibration's, which are even
  by construction (scipy's limiting distribution, `kstwobign`). Small when scores have moved either way.

Windows do not overlap, so that the alarms of a clean stream come at the level: at 0.001, one window in a thousand. All
windows share one calibration, so that after an unlucky draw of it several come together.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PValues = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Window:
    """One judged window.

    Attributes:
        flagged: share of its images at or below the model's rate, in [0, 1].
        probability: test -> how probable a window at least as strange is without drift, in [0, 1].
    """

    flagged: float
    probability: dict[str, float]


def judge_window(p_values: PValues, rate: float, calibration_images: int) -> Window:
    """Judges the p-values of one window, `(images,)`, each in (0, 1].

    Args:
        p_values: conformal p-values of the images.
        rate: the model's default rate of false alarms, in (0, 1).
        calibration_images: on how many clean images the p-values are counted, at least 1.
    """
    # Imported where drift is looked for only: it takes seconds.
    from scipy.stats import betabinom, kstwobign

    images, n = len(p_values), calibration_images
    flagged = int(np.count_nonzero(p_values <= rate))
    rank = min(n, math.ceil(round((n + 1) * (1 - rate), 9)))
    share = float(betabinom.sf(flagged - 1, images, n + 1 - rank, rank))
    # Distance to the even distribution on 1/(n+1), ..., 1: below each value lies its own share.
    ordered = np.sort(p_values)
    above = np.arange(1, images + 1) / images - ordered
    below = ordered - 1 / (n + 1) - np.arange(images) / images
    distance = max(0.0, float(above.max()), float(below.max()))
    even = float(kstwobign.sf(distance * math.sqrt(images * n / (images + n))))
    return Window(flagged / images, {"share": share, "p_values": even})


class DriftCheck:
    """Gathers the p-values of one model until a window is full."""

    def __init__(self, window_images: int) -> None:
        """Starts with an empty window of `window_images`, at least 1."""
        self._window = np.empty(window_images, dtype=np.float64)
        self._filled = 0

    def add(self, p_values: PValues, rate: float, calibration_images: int) -> list[Window]:
        """The windows that became full with these p-values, judged; arguments as `judge_window`."""
        judged = []
        while len(p_values):
            taken = p_values[: len(self._window) - self._filled]
            self._window[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            p_values = p_values[len(taken) :]
            if self._filled == len(self._window):
                judged.append(judge_window(self._window, rate, calibration_images))
                self._filled = 0
        return judged
