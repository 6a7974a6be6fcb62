import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from detector.errors import ArtifactError, RequestError
from detector.paths.evidence_shape import EvidenceShape
from detector.paths.features import features_named
from detector.scoring.classifier import FalseAlarmClassifier, default_estimator, log_odds
from detector.scoring.classifiers import CLASSIFIERS, classifier_named
from detector.scoring.compiled_score import compile_score, folded_score
from detector.scoring.dropout_network import UNITS
from detector.scoring.evaluation import auroc
from detector.scoring.fitting import fit_classifier
from detector.scoring.saved_estimator import load_estimator, save_estimator
from detector.scoring.sums import weighted_sums


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
    np.testing.assert_allclose(compile_score(fitted)(rows), expected, rtol=1e-6, atol=1e-6)  # theirs may be float32


@pytest.mark.parametrize("name", list(CLASSIFIERS))
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_named_classifier_scores_alike_compiled_alone_and_in_a_batch(name):
    chooser = np.random.default_rng(0)
    rows = chooser.normal(0, 1, (400, 12)).astype(np.float32)
    rows[:, 3:] = rows[:, 3:].round(1)  # values that lie on thresholds
    fitted = FalseAlarmClassifier(_smaller(classifier_named(name))).fit(rows[:300], rows[:300, 1] * rows[:300, 2] > 0)

    score = compile_score(fitted)

    end = log_odds(1.0)  # of what scikit-learn gives as shares
    known = score(rows) if hasattr(fitted.estimator_, "decision_function") else np.clip(score(rows), -end, end)
    np.testing.assert_allclose(known, fitted.score_samples(rows), atol=1e-6)
    np.testing.assert_allclose(np.concatenate([score(row[None]) for row in rows[:20]]), score(rows)[:20], atol=1e-9)
    assert score.__name__ != "score_samples"  # compiled, not merely passed on
    assert score(rows[:0]).shape == (0,)


@pytest.mark.parametrize("name", ["multinomial-0.01", "mlp"])
def test_sums_of_several_attacks_score_alike_compiled_loaded_alone_and_in_a_batch(name):
    rows, clean, attacks = two_sided_attacks()
    fitted = fit_classifier(name, clean, attacks)
    expected = FalseAlarmClassifier.around(load_estimator(save_estimator(fitted)), 0.05).score_samples(rows)

    score = compile_score(fitted)

    assert fitted.classes_.tolist() == [0, 1, 2]
    end = np.inf if hasattr(fitted, "decision_function") else log_odds(1.0)
    np.testing.assert_allclose(np.clip(score(rows), -end, end), expected, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([score(row[None]) for row in rows[:20]]), score(rows)[:20], atol=1e-9)
    shares = fitted.predict_proba(rows)
    np.testing.assert_allclose(score(rows), np.log(shares[:, 1:].sum(axis=1)) - np.log(shares[:, 0]), atol=1e-4)
    assert score(rows[:0]).shape == (0,)


@pytest.mark.parametrize("name", ["multinomial-0.01", "mlp"])
def test_other_benign_images_have_sums_of_their_own_against_the_attacks(name):
    rows, clean, attacks = two_sided_attacks()
    blurred, noisy = clean.copy(), clean.copy()
    blurred[:, 1:3] += 5, 6  # like an attack in one column, unlike any in another
    noisy[:, 1:3] -= 5, 6
    fitted = fit_classifier(name, clean, attacks, benign={"blur": blurred, "noise": noisy})
    told_less = fit_classifier(name, clean, attacks)

    assert fitted.classes_.tolist() == [-2, -1, 0, 1, 2]
    shares = fitted.predict_proba(rows)
    odds = np.log(shares[:, 3:].sum(axis=1)) - np.log(shares[:, :3].sum(axis=1))
    np.testing.assert_allclose(compile_score(fitted)(rows), odds, atol=1e-4)
    end = np.inf if name != "mlp" else log_odds(1.0)
    found = FalseAlarmClassifier.around(fitted, 0.05).score_samples(rows)
    np.testing.assert_allclose(found, np.clip(odds, -end, end), atol=1e-4)

    def flagged(estimator):
        score = compile_score(estimator)
        return float((score(np.concatenate([blurred, noisy])) > np.quantile(score(clean), 0.95)).mean())

    assert flagged(fitted) < flagged(told_less) / 2


def test_a_classifier_that_is_told_no_attack_takes_benign_images_for_clean_ones():
    _, clean, attacks = two_sided_attacks()

    fitted = fit_classifier("logistic-0.01", clean, attacks, benign={"noise": clean + 1, "none": clean[:0]})

    assert fitted.classes_.tolist() == [False, True]


def test_attacks_on_either_side_of_the_clean_images_are_told_by_a_sum_for_each():
    rows, clean, attacks = two_sided_attacks()

    def found(name):
        score = compile_score(fit_classifier(name, clean, attacks))
        return auroc(score(clean), score(rows[len(clean) :]))

    assert found("logistic-0.01") < 0.7
    assert found("multinomial-0.01") > 0.9
    assert found("mlp") > 0.9


def test_what_is_carried_on_is_a_kind_of_attack_of_its_own():
    _, clean, attacks = two_sided_attacks()
    further = {"low": attacks["low"] - 3, "high": attacks["high"] + 3}

    assert fit_classifier("multinomial-0.01", clean, attacks, 0, further).classes_.tolist() == [0, 1, 2, 3]
    assert fit_classifier("logistic-0.01", clean, attacks, 0, further).classes_.tolist() == [False, True]


def two_sided_attacks():
    """All rows, clean ones, and those of two attacks that move a column down and up."""
    chooser = np.random.default_rng(0)
    clean, low, high = (chooser.normal(0, 1, (200, 12)).astype(np.float32) for _ in range(3))
    low[:, 1] -= 6
    high[:, 1] += 6
    return np.concatenate([clean, low, high]), clean, {"low": low, "high": high}


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

    def macs(kinds, classes=2):
        features = features_named(kinds, EvidenceShape(3, layers)).fit(rows)
        fitted = default_estimator().fit(features.transform(rows), np.arange(40) % classes)
        return folded_score(fitted, features).macs

    assert macs("bits") == 6
    assert macs("bits", 4) == 3 * 6  # a sum for each class but the first
    assert macs("gates+margins") == 6 + 2
    # Eight columns in each unit, and each unit in three sums of four classes.
    eight = rows[:, :8]
    four = fit_classifier("mlp", eight[:10], {"a": eight[10:20], "b": eight[20:30], "c": eight[30:]})
    assert weighted_sums(four).macs == 8 * UNITS + UNITS * 3
    # Fit and lead of two layers and of the whole; 3 classes x 6 filters; the whitening of 2 x 2 and 4 x 4.
    assert macs("path-likelihoods") == 6 + 18
    assert macs("gate-likelihoods") == 6 + 18 + (4 + 16)


def test_another_classifier_is_no_weighted_sum():
    rows = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32)
    features = features_named("bits", EvidenceShape(3, {"a": 2, "b": 4})).fit(rows)
    forest = RandomForestClassifier(3).fit(features.transform(rows), np.arange(40) % 2)

    assert folded_score(forest, features) is None


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_network_of_scikit_learns_own_training_folds_and_one_of_two_hidden_layers_is_called_as_it_is():
    rows = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    kinds = np.arange(80) % 3

    for sizes, folds in (((5,), True), ((5, 4), False)):
        network = make_pipeline(StandardScaler(), MLPClassifier(sizes, max_iter=20, random_state=0)).fit(rows, kinds)
        classifier = FalseAlarmClassifier.around(network, 0.05)
        assert (weighted_sums(network) is not None) == folds
        np.testing.assert_allclose(compile_score(classifier)(rows), classifier.score_samples(rows), atol=1e-5)


def test_layers_that_do_not_fit_each_other_or_the_features_are_refused_before_compiled_code_reads_them():
    rows = np.random.default_rng(0).normal(size=(40, 3 + 6)).astype(np.float32)
    features = features_named("gates", EvidenceShape(3, {"a": 2, "b": 4})).fit(rows)
    network = fit_classifier("mlp", rows[:10, :6], {"a": rows[10:20, :6], "b": rows[20:, :6]})
    assert folded_score(network, features).sums.count == 2

    with pytest.raises(ArtifactError, match="expected a classifier of the 11 columns of its features, got 6"):
        folded_score(network, features_named("gates+margins+doubts", EvidenceShape(3, {"a": 2, "b": 4})).fit(rows))
    network[-1].coefs_[1] = network[-1].coefs_[1][:9]
    with pytest.raises(ArtifactError, match="expected a classifier whose layers fit each other"):
        folded_score(network, features)


def test_the_default_estimator_is_the_one_that_folds():
    steps = [type(step) for _, step in default_estimator().steps]

    assert steps == [StandardScaler, LogisticRegression]
