import numpy as np
import pytest

from detector.errors import DataError
from detector.paths.evidence_shape import EvidenceShape
from detector.scoring.evaluation import auroc, detection_figures, false_alarm_figures
from detector.scoring.fitting import fit_detector
from detector.scoring.thresholds import Calibration


def evidence(level, count, seed):
    logits = np.random.default_rng(seed).normal(level, 1, (count, 12)).astype(np.float32)
    return EvidenceShape(3, {"a": 12}).evidence(np.concatenate([logits[:, :3], logits], axis=1))


def test_auroc_counts_ties_half():
    assert auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0])) == pytest.approx(0.875)


def test_figures_of_a_case_computed_by_hand():
    calibration = Calibration(np.arange(99.0))
    clean, attacked = np.array([1.0, 50.0, 96.0, 97.0]), np.array([95.0, 94.0, 200.0, 10.0])

    found = detection_figures("made up", clean, attacked, calibration, 0.05)
    alarms = false_alarm_figures(clean, calibration, 0.05)

    assert (found.clean, found.attacked, found.detected) == (4, 4, 0.5)
    assert found.auroc == pytest.approx((2 + 2 + 4 + 1) / 16)
    assert found.auroc_low <= found.auroc <= found.auroc_high
    assert alarms.realised == 0.5
    assert alarms.low == 0.0
    assert alarms.high >= 0.5
    flooded = false_alarm_figures(np.full(100, 96.0), calibration, 0.05)
    assert flooded.realised == 1.0 > flooded.high


def test_a_fitted_detector_tells_two_kinds_of_paths_apart_on_fresh_images():
    fitted = fit_detector("bits", evidence(-1, 300, 0), {"x": evidence(1, 300, 1)}, [evidence(-1, 300, 2)])

    clean, attacked = fitted.scores([evidence(-1, 300, 3)]), fitted.scores([evidence(1, 300, 4)])

    assert auroc(clean, attacked) > 0.95
    alarms = false_alarm_figures(clean, fitted.calibration, 0.05)
    assert alarms.low <= alarms.realised <= alarms.high


def test_without_a_successful_attack_there_is_nothing_to_fit_or_judge():
    with pytest.raises(DataError, match="expected at least one attack that fooled the network"):
        fit_detector("bits", evidence(-1, 9, 0), {}, [evidence(-1, 9, 1)])
    with pytest.raises(DataError, match="expected clean images and successful pgd, got 3 and 0"):
        detection_figures("pgd", np.zeros(3), np.zeros(0), Calibration(np.zeros(99)), 0.05)
