"""Evidence of clean and of attacked images -> a fitted and calibrated detector."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from detector.errors import DataError
from detector.paths.encoder import Evidence
from detector.paths.features import PathFeatures, features_named, rows_of
from detector.scoring.classifier import FalseAlarmClassifier, default_estimator
from detector.scoring.compiled_score import Score, compile_score
from detector.scoring.thresholds import Calibration, Scores


@dataclass(frozen=True, slots=True)
class FittedDetector:
    """A classifier and the scores of clean images that it has not seen.

    Attributes:
        features: what it reads, fitted.
        classifier: the scikit-learn classifier, calibrated.
        score: the same, compiled.
        calibration: scores of the calibration images.
    """

    features: PathFeatures
    classifier: FalseAlarmClassifier
    score: Score
    calibration: Calibration

    def scores(self, parts: Iterable[Evidence]) -> Scores:
        """How suspicious each image of `parts` is, `(images,)`; parts are read one by one."""
        return _scores(self.score, self.features, parts)


def _scores(score: Score, features: PathFeatures, parts: Iterable[Evidence]) -> Scores:
    return np.concatenate([np.empty(0), *(score(features.of(part)) for part in parts)])


def fit_detector(
    features: str,
    clean: Evidence,
    attacked: Mapping[str, Evidence],
    calibration: Iterable[Evidence],
    rate: float = 0.05,
    seed: int = 0,
) -> FittedDetector:
    """Fit on clean images against successful attacks, calibrate on clean images of other sources.

    Args:
        features: kinds of features, of `detector.paths.features.FEATURES`, joined by `+`, or `all`.
        clean: evidence of the clean images of the fitting split.
        attacked: recipe -> evidence of its successful attacks on the fitting split.
        calibration: evidence of the clean images of the calibration split, in parts.
        rate: share of false alarms allowed, in (0, 1).
        seed: of the classifier.

    Raises:
        DataError: no attack succeeded.
        RequestError: the features are unknown, or there are too few calibration images for the rate.
    """
    fitted = features_named(features, clean.class_logits.shape[1], clean.path.layers).fit(rows_of(clean))
    positives = [fitted.of(evidence) for evidence in attacked.values()]
    if not positives:
        raise DataError("expected at least one attack that fooled the network, got none to fit on")
    negatives = fitted.of(clean)
    rows = np.concatenate([negatives, *positives])
    labels = np.arange(len(rows)) >= len(negatives)
    classifier = FalseAlarmClassifier(default_estimator(seed), rate).fit(rows, labels)
    score = compile_score(classifier)
    calibrated_on = Calibration(_scores(score, fitted, calibration))
    return FittedDetector(fitted, classifier.calibrate(calibrated_on), score, calibrated_on)
