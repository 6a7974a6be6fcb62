import sys

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from detector.interpretation.contributions import Contributions, contributions_of
from detector.scoring.classifier import FalseAlarmClassifier
from detector.scoring.dropout_network import DropoutNetwork


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(0)
    labels = np.arange(200) % 2 == 1
    columns = draws.normal(size=(200, 6)) * [1, 5, 0.1, 1, 1, 1] + 3
    columns[labels, 0] += 2
    columns[labels, 2] -= 0.3
    return columns.astype(np.float32), labels


def parts_of(classifier: FalseAlarmClassifier, rows: np.ndarray) -> Contributions:
    return contributions_of(classifier)(rows, classifier.score_samples(rows))


ESTIMATORS = pytest.mark.parametrize("estimator", [None, LogisticRegression()], ids=["standardised", "bare"])


@ESTIMATORS
def test_base_and_parts_sum_to_the_score(rows, estimator):
    classifier = FalseAlarmClassifier(estimator).fit(*rows)
    found = parts_of(classifier, rows[0])
    np.testing.assert_allclose(found.base + found.parts.sum(axis=1), classifier.score_samples(rows[0]), atol=1e-5)


@ESTIMATORS
def test_a_column_set_to_its_mean_takes_its_part_from_the_score(rows, estimator):
    classifier = FalseAlarmClassifier(estimator).fit(*rows)
    before = parts_of(classifier, rows[0][:1])
    top = int(np.abs(before.parts[0]).argmax())
    changed = rows[0][:1].copy()
    changed[0, top] = rows[0][:, top].mean(dtype=np.float64) if estimator is None else 0
    fell = classifier.score_samples(rows[0][:1]) - classifier.score_samples(changed)
    assert fell[0] == pytest.approx(before.parts[0, top], rel=1e-5)


def test_the_columns_that_tell_have_the_largest_parts(rows):
    found = parts_of(FalseAlarmClassifier().fit(*rows), rows[0])
    assert set(np.argsort(-np.abs(found.parts).mean(axis=0))[:2]) == {0, 2}


def test_a_little_noise_changes_the_parts_a_little(rows):
    classifier = FalseAlarmClassifier().fit(*rows)
    noisy = rows[0] + np.random.default_rng(1).normal(scale=1e-3, size=rows[0].shape).astype(np.float32)
    before, after = parts_of(classifier, rows[0]).parts, parts_of(classifier, noisy).parts
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.999
    assert (before.argmax(axis=1) == after.argmax(axis=1)).mean() > 0.95


@pytest.mark.parametrize(
    "model", [LogisticRegression(), DropoutNetwork(16, random_state=0)], ids=["columns", "hidden-layer"]
)
def test_the_sums_of_several_attacks_are_taken_apart_by_integrated_gradients(rows, model):
    columns, attacked = rows
    kinds = np.where(attacked, 1 + np.arange(200) // 2 % 2, 0)
    columns[kinds == 2, 0] -= 4  # the second attack lies on the other side of the clean images
    pipeline = make_pipeline(StandardScaler(), model).fit(columns, kinds)
    classifier = FalseAlarmClassifier.around(pipeline, 0.05)

    found = parts_of(classifier, columns)

    np.testing.assert_allclose(found.base + found.parts.sum(axis=1), classifier.score_samples(columns), rtol=1e-9)
    means = columns.mean(axis=0, dtype=np.float64, keepdims=True)
    np.testing.assert_allclose(found.base[0], classifier.score_samples(means)[0], atol=1e-6)
    assert found.method == "integrated gradients"
    # Both attacks move column 0, one up and one down: either way it is what makes them suspicious.
    assert found.parts[kinds == 1, 0].mean() > found.parts[kinds == 0, 0].mean() + 0.5
    assert found.parts[kinds == 2, 0].mean() > found.parts[kinds == 0, 0].mean() + 0.5


def test_a_column_that_no_sum_weighs_has_no_part(rows):
    columns, attacked = rows
    columns[:, 4] = 7
    kinds = np.where(attacked, 1 + np.arange(200) // 2 % 2, 0)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(columns, kinds)

    found = parts_of(FalseAlarmClassifier.around(pipeline, 0.05), columns)

    assert (found.parts[:, 4] == 0).all()
    assert (found.parts[:, 0] != 0).any()


TREES = pytest.mark.parametrize(
    "trees", [HistGradientBoostingClassifier(max_iter=20), RandomForestClassifier(20)], ids=["boosted", "forest"]
)


@TREES
def test_trees_are_taken_apart_by_shap(rows, trees):
    pytest.importorskip("shap")
    classifier = FalseAlarmClassifier(trees).fit(*rows)
    found = parts_of(classifier, rows[0])
    np.testing.assert_allclose(found.base + found.parts.sum(axis=1), classifier.score_samples(rows[0]), rtol=1e-5)
    assert found.method.startswith("TreeSHAP")
    assert set(np.argsort(-np.abs(found.parts).mean(axis=0))[:2]) == {0, 2}


@TREES
def test_without_shap_the_parts_of_trees_are_left_out_and_told(rows, trees, monkeypatch):
    monkeypatch.setitem(sys.modules, "shap", None)
    classifier = FalseAlarmClassifier(trees).fit(*rows)
    found = parts_of(classifier, rows[0])
    assert (found.parts == 0).all()
    assert "pathguard[explain]" in found.method


def test_scores_that_are_no_sums_have_no_parts(rows):
    classifier = FalseAlarmClassifier(KNeighborsClassifier()).fit(*rows)
    found = parts_of(classifier, rows[0])
    np.testing.assert_array_equal(found.base, classifier.score_samples(rows[0]))
    assert found.method == "no parts: the scores of KNeighborsClassifier are no sums"
