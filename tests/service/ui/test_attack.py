import numpy as np
import pytest

from service.ui.attack import METHODS, attacked
from tests.oracles import MeanBoundary

every_method = pytest.mark.parametrize("method", METHODS)


def grey(level: int) -> np.ndarray:
    return np.full((6, 6, 1), level, np.uint8)


@every_method
def test_no_pixel_changes_by_more_than_the_budget(method):
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (6, 6, 1)).astype(np.uint8)
    for levels in (0, 1, 7, 32):
        change = attacked(MeanBoundary(0.5), pixels, method, levels).astype(int) - pixels
        assert np.abs(change).max() <= levels


@every_method
def test_the_whole_budget_is_used_against_the_predicted_label(method):
    """Class 0 lies below the boundary, so that the attack makes the image brighter; and the other way round."""
    np.testing.assert_array_equal(attacked(MeanBoundary(0.5), grey(100), method, 8), grey(108))
    np.testing.assert_array_equal(attacked(MeanBoundary(0.2), grey(100), method, 8), grey(92))


@every_method
def test_pixels_stay_pixels(method):
    assert attacked(MeanBoundary(2.0), grey(250), method, 32).max() == 255
