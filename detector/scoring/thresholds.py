"""Split-conformal thresholds: a guaranteed rate of false alarms (Vovk et al. 2005; Papadopoulos et al. 2002).

With n calibration scores the threshold for a rate α is their ceil((n + 1)(1 - α))-th smallest, and the p-value of a
score s is (1 + #{calibration scores >= s}) / (n + 1); a score lies above the threshold exactly where its p-value is at
most α. So one sorted array answers for every rate, without refitting. Kept libraries (MAPIE, crepes) wrap predictors
of labels or values; a one-sided p-value of an outlier score is these two lines.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import betabinom

from detector.errors import RequestError

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scores of clean images that neither network nor classifier was fitted on.

    Attributes:
        scores: ascending, `(images,)`; larger is more suspicious.
    """

    scores: Scores

    def __post_init__(self) -> None:
        if self.scores.ndim != 1 or len(self.scores) == 0 or not np.isfinite(self.scores).all():
            raise RequestError(f"expected a row of finite calibration scores, got shape {self.scores.shape}")
        object.__setattr__(self, "scores", np.sort(self.scores))

    def __len__(self) -> int:
        return len(self.scores)

    def p_values(self, scores: Scores) -> Scores:
        """Share of clean images at least as suspicious, in [1 / (n + 1), 1], the shape of `scores`."""
        as_high = len(self.scores) - np.searchsorted(self.scores, scores, side="left")
        return (1 + as_high) / (len(self.scores) + 1)

    @property
    def smallest_rate(self) -> float:
        """The smallest rate of false alarms for which there is a threshold, 1 / (n + 1)."""
        return 1 / (len(self.scores) + 1)

    def check_rate(self, max_false_alarm_rate: float) -> None:
        """Refuse a rate for which there is no threshold.

        Raises:
            RequestError: the rate is not in [1 / (n + 1), 1).
        """
        if not self.smallest_rate <= max_false_alarm_rate < 1:
            raise RequestError(
                f"expected a false-alarm rate from {self.smallest_rate:.6f} (that {len(self)} calibration images "
                f"allow) to below 1, got {max_false_alarm_rate}"
            )

    def threshold(self, max_false_alarm_rate: float) -> float:
        """The score above which an image is flagged.

        Raises:
            RequestError: there is no threshold for this rate.
        """
        self.check_rate(max_false_alarm_rate)
        n = len(self.scores)
        # Guard against (n + 1)(1 - α) landing a rounding error above a whole number.
        rank = math.ceil(round((n + 1) * (1 - max_false_alarm_rate), 9))
        return float(self.scores[rank - 1])

    def expected_range(self, max_false_alarm_rate: float, images: int, level: float = 0.99) -> tuple[float, float]:
        """The `level` prediction interval of the realised rate on `images` fresh clean images.

        False alarms among them are beta-binomial: with k = ceil((n + 1)(1 - α)), the false-alarm probability given
        the calibration scores is Beta(n + 1 - k, k).

        Raises:
            RequestError: there is no threshold for this rate.
        """
        self.check_rate(max_false_alarm_rate)
        n = len(self.scores)
        rank = math.ceil(round((n + 1) * (1 - max_false_alarm_rate), 9))
        alarms = betabinom(images, n + 1 - rank, rank)
        low, high = alarms.ppf((1 - level) / 2), alarms.ppf((1 + level) / 2)
        return float(low / images), float(high / images)
