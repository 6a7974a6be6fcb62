"""Split-conformal thresholds: a guaranteed rate of false alarms (Vovk et al. 2005; Papadopoulos et al. 2002).

With n calibration scores the threshold for a rate α is their ceil((n + 1)(1 - α))-th smallest, and the p-value of a
score s is (1 + #{calibration scores >= s}) / (n + 1); a score lies above the threshold exactly where its p-value is at
most α. So one sorted array answers for every rate, without refitting. Kept libraries (MAPIE, crepes) wrap predictors
of labels or values; a one-sided p-value of an outlier score is these two lines.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import betabinom, binomtest
from scipy.stats.distributions import rv_frozen

from detector.errors import RequestError

Scores = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scores of clean images that neither network nor classifier was fitted on.

    With labels it is Mondrian (Vovk et al. 2005, section 4.5): an image is compared with calibration images of its own
    predicted class alone, and the rate of false alarms holds for each class by itself.

    Attributes:
        scores: ascending, `(images,)`; larger is more suspicious.
        labels: predicted class of each, `int64`, `(images,)`; None to compare with images of all classes.
    """

    scores: Scores
    labels: Labels | None = None

    def __post_init__(self) -> None:
        if self.scores.ndim != 1 or len(self.scores) == 0 or not np.isfinite(self.scores).all():
            raise RequestError(f"expected a row of finite calibration scores, got shape {self.scores.shape}")
        if self.labels is not None and self.labels.shape != self.scores.shape:
            raise RequestError(f"expected a label for each of {len(self.scores)} scores, got {self.labels.shape}")
        order = np.argsort(self.scores, kind="stable")
        object.__setattr__(self, "scores", self.scores[order])
        if self.labels is not None:
            object.__setattr__(self, "labels", self.labels[order])

    def __len__(self) -> int:
        return len(self.scores)

    def of_class(self, label: int) -> "Calibration":
        """The calibration images that an image of this predicted class is compared with: those of the class, or of all
        classes where there are no labels or none is of that class."""
        own = None if self.labels is None else self.labels == label
        return self if own is None else Calibration(self.scores[own]) if own.any() else self.pooled()

    def pooled(self) -> "Calibration":
        """The same images, compared with whatever their class."""
        return Calibration(self.scores)

    def p_values(self, scores: Scores, labels: Labels | None = None) -> Scores:
        """Share of clean images at least as suspicious, in [1 / (n + 1), 1], the shape of `scores`.

        Args:
            scores: of the images in question, `(images,)`.
            labels: their predicted classes; needed where the calibration has labels. An image of a class that no
                calibration image is of is compared with those of all classes: were it let pass, an attack would only
                have to reach that label.
        """
        if self.labels is not None:
            if labels is None:
                raise RequestError("expected the predicted classes for a calibration of each class, got none")
            found = np.empty(len(scores))
            for label in np.unique(labels).tolist():
                own = labels == label
                found[own] = self.of_class(label).p_values(scores[own])
            return found
        as_high = len(self.scores) - np.searchsorted(self.scores, scores, side="left")
        return (1 + as_high) / (len(self.scores) + 1)

    @property
    def smallest_rate(self) -> float:
        """The smallest rate of false alarms for which there is a threshold, 1 / (n + 1)."""
        return 1 / (min((len(part) for part in self._classes()), default=0) + 1)

    def _classes(self) -> "Iterator[Calibration]":
        if self.labels is None:
            yield self
        else:
            yield from (self.of_class(label) for label in np.unique(self.labels).tolist())

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
        """The score above which an image is flagged, whatever its class; `thresholds` tells those of the classes.

        Raises:
            RequestError: there is no threshold for this rate.
        """
        self.check_rate(max_false_alarm_rate)
        n = len(self.scores)
        # Guard against (n + 1)(1 - α) landing a rounding error above a whole number.
        rank = math.ceil(round((n + 1) * (1 - max_false_alarm_rate), 9))
        return float(self.scores[rank - 1])

    def thresholds(self, max_false_alarm_rate: float, classes: int) -> Scores:
        """For each predicted class the score above which an image is flagged, `(classes,)`.

        Raises:
            RequestError: there is no threshold for this rate.
        """
        if self.labels is None:
            return np.full(classes, self.threshold(max_false_alarm_rate))
        return np.array([self.of_class(label).threshold(max_false_alarm_rate) for label in range(classes)])

    def expected_range(
        self, max_false_alarm_rate: float, images: int, level: float = 0.99, labels: Labels | None = None
    ) -> tuple[float, float]:
        """The `level` prediction interval of the realised rate on `images` fresh clean images.

        False alarms among them are beta-binomial: with k = ceil((n + 1)(1 - α)), the false-alarm probability given
        the calibration scores is Beta(n + 1 - k, k). Where each class has its own calibration images, those of all
        classes are a sum of such numbers.

        Args:
            max_false_alarm_rate: α.
            images: how many.
            level: of the interval.
            labels: their predicted classes, `(images,)`; needed where the calibration has labels.

        Raises:
            RequestError: there is no threshold for this rate, or labels are missing.
        """
        self.check_rate(max_false_alarm_rate)
        if self.labels is None:
            alarms = self._alarms(max_false_alarm_rate, images)
            low, high = alarms.ppf((1 - level) / 2), alarms.ppf((1 + level) / 2)
            return float(low / images), float(high / images)
        if labels is None:
            raise RequestError("expected the predicted classes for a calibration of each class, got none")
        chances = np.ones(1)
        for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
            alarms = self.of_class(int(label))._alarms(max_false_alarm_rate, int(count))
            chances = np.convolve(chances, alarms.pmf(np.arange(count + 1)))
        low, high = np.searchsorted(chances.cumsum(), [(1 - level) / 2, (1 + level) / 2])
        return float(low / images), float(high / images)

    def _alarms(self, max_false_alarm_rate: float, images: int) -> rv_frozen:
        n = len(self.scores)
        rank = math.ceil(round((n + 1) * (1 - max_false_alarm_rate), 9))
        return betabinom(images, n + 1 - rank, rank)


def clopper_pearson(hits: int, images: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share of which `hits` of `images` were seen (Clopper and Pearson 1934)."""
    found = binomtest(hits, images).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)
