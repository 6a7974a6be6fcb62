import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from detector.scoring.classifier import FalseAlarmClassifier, default_estimator
from detector.scoring.compiled_score import compile_score


@pytest.mark.parametrize(
    "estimator",
    [
        default_estimator(),
        make_pipeline(StandardScaler(with_mean=False), LogisticRegression()),
        make_pipeline(StandardScaler(with_std=False), LogisticRegression()),
        LogisticRegression(),
        GradientBoostingClassifier(n_estimators=5),
        FalseAlarmClassifier(),
        FalseAlarmClassifier(RandomForestClassifier(5)),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_compiled_score_equals_scikit_learns_own(estimator):
    chooser = np.random.default_rng(0)
    rows = chooser.normal(3, 5, (300, 40)).astype(np.float32)
    rows[:, 0] = 1.0  # a constant column, such as a filter that never closes
    fitted = estimator.fit(rows, rows[:, 1] > 3)

    wraps = isinstance(fitted, FalseAlarmClassifier)
    expected = fitted.score_samples(rows) if wraps else fitted.decision_function(rows)
    np.testing.assert_allclose(compile_score(fitted)(rows), expected, atol=1e-6)


def test_the_default_estimator_is_the_one_that_folds():
    steps = [type(step) for _, step in default_estimator().steps]

    assert steps == [StandardScaler, LogisticRegression]
