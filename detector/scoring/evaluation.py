"""Figures of a detector on images that no step before has seen."""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

from detector.errors import DataError
from detector.scoring.thresholds import Calibration, Scores


@dataclass(frozen=True, slots=True)
class DetectionFigures:
    """One attack against one detector.

    Attributes:
        attack: name of the attack.
        clean: clean test images.
        attacked: test images that the attack fooled the network on.
        auroc: area under the ROC curve, in [0, 1].
        auroc_low: lower end of its 95 % bootstrap interval.
        auroc_high: upper end.
        detected: share of the attacked images that are flagged at the rate, in [0, 1].
    """

    attack: str
    clean: int
    attacked: int
    auroc: float
    auroc_low: float
    auroc_high: float
    detected: float


@dataclass(frozen=True, slots=True)
class FalseAlarmFigures:
    """False alarms on clean images at the calibrated threshold.

    Attributes:
        images: clean test images.
        calibration_images: calibration images, n.
        rate: the rate that the threshold was set for, α.
        realised: share of the clean images that are flagged.
        low: lower end of the 99 % prediction interval of the realised rate.
        high: upper end.
    """

    images: int
    calibration_images: int
    rate: float
    realised: float
    low: float
    high: float


def detection_figures(
    attack: str, clean: Scores, attacked: Scores, calibration: Calibration, rate: float, seed: int = 0
) -> DetectionFigures:
    """Figures of one attack.

    Args:
        attack: its name.
        clean: scores of clean test images, `(images,)`.
        attacked: scores of successful attacks on test images, `(images,)`.
        calibration: sets the threshold.
        rate: share of false alarms allowed, in (0, 1).
        seed: of the bootstrap.

    Raises:
        DataError: there are no clean or no attacked images.
        RequestError: there is no threshold for the rate.
    """
    if len(clean) == 0 or len(attacked) == 0:
        raise DataError(f"expected clean images and successful {attack}, got {len(clean)} and {len(attacked)}")
    low, high = bootstrap_interval(clean, attacked, seed)
    flagged = attacked > calibration.threshold(rate)
    return DetectionFigures(attack, len(clean), len(attacked), auroc(clean, attacked), low, high, float(flagged.mean()))


def false_alarm_figures(clean: Scores, calibration: Calibration, rate: float) -> FalseAlarmFigures:
    """False alarms on clean test images, `(images,)`, at the threshold for `rate`.

    Raises:
        RequestError: there is no threshold for the rate.
    """
    low, high = calibration.expected_range(rate, len(clean))
    realised = float((clean > calibration.threshold(rate)).mean())
    return FalseAlarmFigures(len(clean), len(calibration), rate, realised, low, high)


def auroc(clean: Scores, attacked: Scores) -> float:
    """Chance that an attacked image scores higher than a clean one, ties counted half, in [0, 1]."""
    labels = np.concatenate([np.zeros(len(clean)), np.ones(len(attacked))])
    return float(roc_auc_score(labels, np.concatenate([clean, attacked])))


def bootstrap_interval(clean: Scores, attacked: Scores, seed: int, draws: int = 200) -> tuple[float, float]:
    """The 95 % interval of the AUROC when both sets of images are drawn again."""
    chooser = np.random.default_rng(seed)
    values = [auroc(chooser.choice(clean, len(clean)), chooser.choice(attacked, len(attacked))) for _ in range(draws)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
