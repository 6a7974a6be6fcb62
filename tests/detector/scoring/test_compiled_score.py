import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from detector.errors import RequestError
from detector.paths.features import features_named
from detector.scoring.classifier import FalseAlarmClassifier, default_estimator
from detector.scoring.classifiers import CLASSIFIERS, classifier_named
from detector.scoring.compiled_score import compile_score, linear_score


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


@pytest.mark.parametrize("name", list(CLASSIFIERS))
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_named_classifier_scores_alike_compiled_alone_and_in_a_batch(name):
    chooser = np.random.default_rng(0)
    rows = chooser.normal(0, 1, (400, 12)).astype(np.float32)
    rows[:, 3:] = rows[:, 3:].round(1)  # values that lie on thresholds
    fitted = FalseAlarmClassifier(_smaller(classifier_named(name))).fit(rows[:300], rows[:300, 1] * rows[:300, 2] > 0)

    score = compile_score(fitted)

    np.testing.assert_allclose(score(rows), fitted.score_samples(rows), atol=1e-6)
    np.testing.assert_allclose(np.concatenate([score(row[None]) for row in rows[:20]]), score(rows)[:20], atol=1e-9)
    assert score.__name__ != "score_samples"  # compiled, not merely passed on
    assert score(rows[:0]).shape == (0,)


def _smaller(pipeline):
    step = pipeline.steps[-1][1]
    for name in ("n_estimators", "max_iter"):
        if name in step.get_params() and not isinstance(step, LogisticRegression):
            step.set_params(**{name: 12})
    return pipeline


def test_an_unknown_classifier_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match="expected a classifier of logistic-0.001, .*; got 'oracle'"):
        classifier_named("oracle")


def test_the_multiplications_of_a_score_counted_by_hand():
    rows = np.random.default_rng(0).normal(size=(40, 3 + 6)).astype(np.float32)
    layers = {"a": 2, "b": 4}

    def macs(kinds):
        features = features_named(kinds, 3, layers).fit(rows)
        fitted = default_estimator().fit(features.transform(rows), np.arange(40) % 2)
        return linear_score(fitted, features).macs

    assert macs("bits") == 6
    assert macs("gates+margins") == 6 + 2
    # Fit and lead of two layers and of the whole; 3 classes x 6 filters; the whitening of 2 x 2 and 4 x 4.
    assert macs("path-likelihoods") == 6 + 18
    assert macs("gate-likelihoods") == 6 + 18 + (4 + 16)


def test_another_classifier_is_no_weighted_sum():
    rows = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32)
    features = features_named("bits", 3, {"a": 2, "b": 4}).fit(rows)
    fitted = RandomForestClassifier(3).fit(features.transform(rows), np.arange(40) % 2)

    assert linear_score(fitted, features) is None


def test_the_default_estimator_is_the_one_that_folds():
    steps = [type(step) for _, step in default_estimator().steps]

    assert steps == [StandardScaler, LogisticRegression]
