"""`pathguard calibrate`."""

import json

import pytest

from detector.bundle import Bundle
from detector.scoring.detector import Detector
from tests.pathguard.conftest import written
from tests.pathguard.test_cli import run

__all__ = ["run"]


@pytest.fixture
def photos(tmp_path, digits):
    return written(digits.test.pixels(slice(0, 59)), tmp_path / "photos")


def test_the_threshold_follows_the_images_and_the_model_stays(run, fitted_bundle, photos, digits):
    before = Detector(fitted_bundle, engine="masked")

    code, out, _ = run("calibrate", photos, "--bundle", fitted_bundle.folder, "--max-false-alarm-rate", 0.1, "--json")

    told = json.loads(out)[0]
    bundle = Bundle(fitted_bundle.folder)
    after = Detector(bundle, engine="masked")
    found = after.detect(digits.test.pixels(slice(0, 59)))
    assert code == 0
    assert (after.model_version, after.calibration_images) == (before.model_version, 59)
    assert after.threshold_version != before.threshold_version
    assert (found.p_values <= 0.1).sum() == 5  # beside which each is 1 of 60
    assert told["flagged_before"] == (before.detect(digits.test.pixels(slice(0, 59))).p_values <= 0.1).mean()
    assert "calibration" in bundle.manifest.training
    assert "59" in (bundle.folder / "MODEL_CARD.md").read_text()


def test_rate_and_classes_remain_unless_they_are_named(run, fitted_bundle, photos):
    rate = Bundle(fitted_bundle.folder).detector_info().max_false_alarm_rate
    run("calibrate", photos, "--bundle", fitted_bundle.folder)
    kept = Bundle(fitted_bundle.folder)
    assert kept.detector_info().max_false_alarm_rate == rate
    assert kept.calibration().labels is None

    run("calibrate", photos, "--bundle", fitted_bundle.folder, "--per-class", "--max-false-alarm-rate", 0.5)
    assert Bundle(fitted_bundle.folder).calibration().labels is not None
    run("calibrate", photos, "--bundle", fitted_bundle.folder)
    assert Bundle(fitted_bundle.folder).calibration().labels is not None


def test_too_few_images_or_a_damaged_one_change_nothing(run, fitted_bundle, photos):
    before = fitted_bundle.threshold_digest

    code, _, err = run("calibrate", photos, "--bundle", fitted_bundle.folder, "--max-false-alarm-rate", 0.001)
    assert code == 1
    assert "expected a false-alarm rate from 0.016667" in err
    (photos / "7.png").write_bytes(b"no image")
    code, _, err = run("calibrate", photos, "--bundle", fitted_bundle.folder)
    assert code == 1
    assert "7.png: expected" in err
    assert len(err.splitlines()) == 1
    assert Bundle(fitted_bundle.folder).threshold_digest == before
