import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.errors import RequestError
from detector.scoring.thresholds import Calibration, clopper_pearson

scores = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=40).map(np.array)


def test_the_threshold_is_the_conformal_order_statistic():
    calibration = Calibration(np.arange(99.0)[::-1])

    assert calibration.threshold(0.05) == 94.0  # the 95th smallest of 99
    assert calibration.threshold(0.01) == 98.0  # the 99th
    assert calibration.p_values(np.array([98.5, 98.0, -1.0])).tolist() == [0.01, 0.02, 1.0]


@given(scores, scores, st.floats(0.001, 0.999))
def test_a_score_lies_above_the_threshold_exactly_where_its_p_value_is_at_most_the_rate(calibration, others, rate):
    fitted = Calibration(calibration)
    if rate < fitted.smallest_rate:
        with pytest.raises(RequestError, match="expected a false-alarm rate from"):
            fitted.threshold(rate)
        return

    assert np.array_equal(others > fitted.threshold(rate), fitted.p_values(others) <= rate + 1e-12)


def test_false_alarms_on_fresh_images_stay_below_the_rate_on_average():
    chooser = np.random.default_rng(0)
    realised = [
        (chooser.normal(size=500) > Calibration(chooser.normal(size=200)).threshold(0.05)).mean() for _ in range(300)
    ]

    assert 0.04 < np.mean(realised) < 0.053


def test_the_prediction_interval_covers_as_often_as_it_says():
    chooser = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        calibration = Calibration(chooser.normal(size=300))
        low, high = calibration.expected_range(0.05, 300)
        inside += low <= (chooser.normal(size=300) > calibration.threshold(0.05)).mean() <= high

    assert 0.97 < inside / 400 <= 1.0


@pytest.mark.parametrize("rate", [0.0, 0.001, 1.0, -1.0, float("nan")])
def test_a_rate_without_a_threshold_is_refused_and_the_smallest_is_named(rate):
    with pytest.raises(RequestError, match=r"from 0\.010000 \(that 99 calibration images allow\) to below 1, got"):
        Calibration(np.arange(99.0)).threshold(rate)


def test_each_class_has_its_own_threshold_and_its_own_false_alarms():
    chooser = np.random.default_rng(2)

    def draw(count):
        labels = chooser.integers(2, size=count)
        return chooser.normal(size=count) + 5 * labels, labels

    calibration, (scores, labels) = Calibration(*draw(4000)), draw(4000)

    flagged = calibration.p_values(scores, labels) <= 0.05
    thresholds = calibration.thresholds(0.05, 3)

    assert np.array_equal(flagged, scores > thresholds[labels])
    for label in (0, 1):
        assert 0.03 < flagged[labels == label].mean() < 0.07
    pooled = calibration.pooled().p_values(scores) <= 0.05
    assert pooled[labels == 0].mean() == 0
    assert calibration.smallest_rate == 1 / (min((calibration.labels == label).sum() for label in (0, 1)) + 1)
    with pytest.raises(RequestError, match="expected the predicted classes"):
        calibration.p_values(scores)


def test_an_image_of_a_class_without_calibration_images_is_compared_with_those_of_all_classes():
    calibration = Calibration(np.arange(99.0), np.arange(99) % 2)

    assert calibration.p_values(np.array([99.0, 49.0]), np.array([2, 2])).tolist() == [0.01, 0.51]
    assert calibration.thresholds(0.05, 3)[2] == calibration.pooled().threshold(0.05)


def test_the_interval_of_false_alarms_is_that_of_the_classes_where_each_has_its_threshold():
    chooser = np.random.default_rng(0)
    few = np.repeat([0, 1], [30, 970])
    labels, realised = np.repeat([0, 1], [500, 500]), []
    for _ in range(400):
        calibration = Calibration(chooser.normal(size=1000), few)
        realised.append((calibration.p_values(chooser.normal(size=1000), labels) <= 0.05).mean())

    low, high = calibration.expected_range(0.05, 1000, 0.9, labels)
    shares = np.array(realised)
    pooled = calibration.pooled().expected_range(0.05, 1000, 0.9)

    assert np.mean((low <= shares) & (shares <= high)) == pytest.approx(0.9, abs=0.05)
    assert low < pooled[0]
    assert high > pooled[1]
    one = Calibration(calibration.scores, np.zeros(1000, np.int64))
    assert one.expected_range(0.05, 1000, labels=np.zeros(1000, np.int64)) == one.pooled().expected_range(0.05, 1000)
    with pytest.raises(RequestError, match="expected the predicted classes"):
        calibration.expected_range(0.05, 1000)


def test_the_interval_of_a_share_is_that_of_clopper_and_pearson():
    low, high = clopper_pearson(0, 10)

    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 10))


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
def test_scores_that_cannot_calibrate_are_refused(values):
    with pytest.raises(RequestError, match="expected a row of finite calibration scores"):
        Calibration(np.array(values))
