import numpy as np
import pytest

from service.records.drift import DriftCheck, judge_window


def p_values_of(scores, calibration):
    ordered = np.sort(calibration)
    return (1 + len(ordered) - np.searchsorted(ordered, scores)) / (len(ordered) + 1)


def judged(shift, *, windows=400, images=200, calibration=499):
    random = np.random.default_rng(0)
    for _ in range(windows):
        scores = random.normal(shift, size=images)
        yield judge_window(p_values_of(scores, random.normal(size=calibration)), 0.05, calibration)


@pytest.mark.parametrize("test", ["share", "p_values"])
def test_clean_windows_raise_the_alarm_at_most_as_often_as_the_level_says(test):
    alarms = sum(window.probability[test] < 0.05 for window in judged(0.0))
    assert alarms <= 400 * 0.05 + 3 * (400 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("test", ["share", "p_values"])
def test_more_suspicious_images_raise_it(test):
    assert all(window.probability[test] < 0.001 for window in judged(1.5, windows=20))


def test_less_suspicious_images_are_seen_by_the_p_values_only():
    windows = list(judged(-1.5, windows=20))
    assert all(window.probability["p_values"] < 0.001 for window in windows)
    assert all(window.probability["share"] > 0.5 for window in windows)


def test_the_share_is_that_of_the_images_at_or_below_the_rate():
    window = judge_window(np.array([0.05, 0.06, 1.0, 0.01]), 0.05, 99)
    assert window.flagged == 0.5
    assert 0 < window.probability["share"] < 0.05


def test_one_image_alone_proves_nothing():
    probability = judge_window(np.array([1.0]), 0.05, 99).probability
    assert probability["share"] == 1.0
    assert probability["p_values"] > 0.2


def test_windows_fill_over_calls_and_do_not_overlap():
    check = DriftCheck(4)
    assert check.add(np.full(3, 0.5), 0.05, 99) == []
    assert len(check.add(np.full(6, 0.5), 0.05, 99)) == 2
    assert len(check.add(np.full(3, 0.01), 0.05, 99)) == 1
    assert check.add(np.array([]), 0.05, 99) == []
