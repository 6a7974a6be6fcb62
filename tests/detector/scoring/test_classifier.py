import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from detector.scoring.classifier import FalseAlarmClassifier


@parametrize_with_checks([FalseAlarmClassifier()])
def test_keeps_the_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", [LogisticRegression(), RandomForestClassifier(20, random_state=0)])
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_flags_no_more_of_the_negatives_than_allowed(estimator, rate):
    chooser = np.random.default_rng(0)
    rows = np.concatenate([chooser.normal(0, 1, (500, 3)), chooser.normal(2, 1, (500, 3))])
    labels = np.repeat(["clean", "hostile"], 500)

    fitted = FalseAlarmClassifier(estimator, rate).fit(rows, labels)

    assert (fitted.predict(rows[:500]) == "hostile").mean() <= rate
    assert (fitted.predict(rows[500:]) == "hostile").mean() > 0.5
    assert np.array_equal(fitted.decision_function(rows) > 0, fitted.predict(rows) == "hostile")
