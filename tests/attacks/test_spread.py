import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attacks.spread import Spread

norms = st.floats(0, 1e6).map(lambda value: 0.0 if value < 1e-2 else value)


def spread_of(*parts):
    spread = Spread()
    for values in parts:
        spread.add(np.asarray(values, np.float32))
    return spread


@given(st.lists(norms, min_size=1, max_size=50), st.floats(0, 1))
def test_a_quantile_is_within_a_thousandth_of_the_exact_one(values, share):
    exact = np.quantile(np.asarray(values, np.float32).astype(float), share)

    assert spread_of(values).quantile(share) == pytest.approx(exact, rel=1e-3)


def test_values_alike_give_their_exact_quantiles():
    grey_levels = np.float32(8 / 255)

    assert spread_of([grey_levels] * 3, [grey_levels] * 4).quantile(0.5) == grey_levels


def test_no_values_have_no_quantile():
    assert math.isnan(Spread().quantile(0.5))
    assert len(Spread().cumulative()[0]) == 0


def test_values_outside_the_bins_are_counted_at_their_ends():
    spread = spread_of([0, 1e-9, 1e-5, 1, 1e9])

    values, counts = spread.cumulative()

    assert counts.tolist() == [1, 3, 4, 5]
    assert values[[0, 2, 3]].tolist() == [0, 1, 1e9]
    assert spread.quantile(0) == 0


def test_cumulative_counts_values_that_are_not_larger():
    values, counts = spread_of([3, 1], [2, 1]).cumulative()

    assert values.tolist() == [1, 2, 3]
    assert counts.tolist() == [2, 3, 4]
