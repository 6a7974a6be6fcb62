"""Another threshold for a fitted detector, by clean images of another source."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from detector.bundle import Bundle, recalibrate
from detector.errors import DataError
from detector.images import Pixels
from detector.model_card import write_card
from detector.scoring.detector import Detector
from detector.scoring.thresholds import Calibration


@dataclass(frozen=True, slots=True)
class Recalibrated:
    """What became of the threshold.

    Attributes:
        images: clean images that it now rests on.
        max_false_alarm_rate: share of clean images that may be flagged.
        flagged_before: share of these images that the former calibration flags at that rate; far from the rate, they
            are unlike those of the former.
        per_class: whether the rate holds for each predicted class by itself.
    """

    images: int
    max_false_alarm_rate: float
    flagged_before: float
    per_class: bool


def recalibrated(
    bundle: Bundle, images: Iterable[Pixels], max_false_alarm_rate: float | None = None, per_class: bool | None = None
) -> tuple[Bundle, Recalibrated]:
    """The bundle, in its own folder, calibrated on other clean images; network and classifier stay.

    Args:
        bundle: with a detector.
        images: `uint8`, `(images, height, width, channels)`, in batches; nothing may have been fitted on them.
        max_false_alarm_rate: in (0, 1); None for the one it has.
        per_class: whether the rate is to hold for each predicted class by itself; None for as before.

    Raises:
        ArtifactError: the bundle has no detector, or so few images give no threshold for that rate.
        DataError: there are no images.
        ImageError: they are of another shape than the network takes.
    """
    detector = Detector(bundle, engine="masked")
    rate = detector.max_false_alarm_rate if max_false_alarm_rate is None else max_false_alarm_rate
    by_class = bundle.calibration().labels is not None if per_class is None else per_class
    found = [detector.detect(batch) for batch in images]
    if not found:
        raise DataError("expected clean images to calibrate on, got none")
    p_values = np.concatenate([part.p_values for part in found])
    labels = np.concatenate([part.labels for part in found])
    calibration = Calibration(np.concatenate([part.scores for part in found]), labels if by_class else None)
    figures = Recalibrated(len(calibration), rate, float((p_values <= rate).mean()), by_class)
    grown = recalibrate(bundle, calibration, rate, asdict(figures))
    write_card(grown)
    return grown, figures
