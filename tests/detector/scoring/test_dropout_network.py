import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.neural_network import MLPClassifier

from detector.scoring.dropout_network import DropoutNetwork
from detector.scoring.saved_estimator import load_estimator, save_estimator

DRAWS = np.random.default_rng(0)
ROWS = DRAWS.normal(size=(400, 5)).astype(np.float32)
EITHER = ROWS[:, 1] * ROWS[:, 2] > 0  # no weighted sum of the columns tells these


def test_it_tells_what_no_weighted_sum_of_the_columns_tells():
    fitted = DropoutNetwork(32, random_state=0).fit(ROWS[:300], EITHER[:300])

    assert fitted.score(ROWS[300:], EITHER[300:]) > 0.85
    assert fitted.predict_proba(ROWS).shape == (400, 2)


def test_classes_have_any_names_and_shares_that_sum_to_one():
    named = np.where(EITHER, np.where(ROWS[:, 3] > 0, 7, -2), 0)

    fitted = DropoutNetwork(32, random_state=0).fit(ROWS[:300], named[:300])

    assert fitted.classes_.tolist() == [-2, 0, 7]
    np.testing.assert_allclose(fitted.predict_proba(ROWS).sum(axis=1), 1, atol=1e-6)
    assert fitted.score(ROWS[300:], named[300:]) > 0.75


def test_a_row_without_weight_has_no_say():
    wrong = EITHER.copy()
    wrong[200:300] = ~wrong[200:300]
    weights = np.r_[np.ones(200), np.zeros(100)]

    fitted = DropoutNetwork(32, random_state=0).fit(ROWS[:300], wrong[:300], weights)

    assert fitted.score(ROWS[300:], EITHER[300:]) > 0.85


def test_the_random_state_alone_decides_and_the_generators_of_others_stay():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    first, again, other = (
        DropoutNetwork(8, random_state=seed).fit(ROWS, EITHER).network_.coefs_[0] for seed in (0, 0, 1)
    )

    torch.testing.assert_close(torch.rand(3), expected)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_it_is_fitted_anew_each_time_and_can_be_cloned():
    network = DropoutNetwork(8, random_state=0).fit(ROWS, EITHER)
    before = network.network_.coefs_[0]

    network.fit(ROWS, ROWS[:, 0].round().astype(int))

    assert len(network.classes_) > 2
    np.testing.assert_array_equal(clone(network).fit(ROWS, EITHER).network_.coefs_[0], before)


def test_it_is_saved_as_scikit_learns_own_without_what_fitting_left():
    network = DropoutNetwork(8, random_state=0).fit(ROWS, EITHER)

    content = save_estimator(network.network_)

    assert type(network.network_) is MLPClassifier
    np.testing.assert_array_equal(load_estimator(content).predict_proba(ROWS), network.predict_proba(ROWS))
    assert b"AdamOptimizer" not in content
    assert b"_best_coefs" not in content


def test_rows_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        DropoutNetwork(8).fit(np.full((9, 2), np.nan), np.arange(9) % 2)
