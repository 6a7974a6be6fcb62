import numpy as np
import pytest
from sklearn.ensemble import (
    AdaBoostClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from detector.errors import ArtifactError
from detector.scoring.saved_estimator import load_estimator, save_estimator

ROWS = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
LABELS = ROWS[:, 0] + ROWS[:, 1] > 0


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(5, random_state=0),
        AdaBoostClassifier(n_estimators=5, random_state=0),
        GradientBoostingClassifier(n_estimators=5, random_state=0),
        HistGradientBoostingClassifier(max_iter=5),
        MLPClassifier((4,), max_iter=5, early_stopping=True, random_state=0),
        LogisticRegression(),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_a_classifier_comes_back_with_the_same_answers(estimator):
    fitted = make_pipeline(estimator).fit(ROWS, LABELS)

    again = load_estimator(save_estimator(fitted))

    assert np.array_equal(again.predict_proba(ROWS), fitted.predict_proba(ROWS))


def test_types_that_run_code_are_neither_written_nor_read(monkeypatch):
    risky = make_pipeline(FunctionTransformer(np.loadtxt), IsolationForest())

    with pytest.raises(ArtifactError, match="expected a classifier of trusted scikit-learn types, got numpy.loadtxt"):
        save_estimator(risky)
    monkeypatch.setattr("detector.scoring.saved_estimator._untrusted", lambda content: [])
    content = save_estimator(risky)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="expected trusted scikit-learn types in the classifier, got numpy.loadtxt"):
        load_estimator(content)


@pytest.mark.parametrize("change", ["outside", "backwards", "column"])
def test_a_forest_whose_nodes_lead_nowhere_is_refused(change):
    forest = RandomForestClassifier(3, random_state=0).fit(ROWS, LABELS)
    tree = forest.estimators_[1].tree_
    state = tree.__getstate__()
    nodes = state["nodes"]
    inner = np.flatnonzero(nodes["left_child"] != -1)[-1]
    if change == "outside":
        nodes["right_child"][inner] = len(nodes)
    elif change == "backwards":
        nodes["left_child"][inner] = 0
    else:
        nodes["feature"][inner] = 5
    tree.__setstate__(state)

    with pytest.raises(ArtifactError, match="expected trees of 5 columns whose nodes lead on to later nodes"):
        load_estimator(save_estimator(forest))


def test_a_boosted_forest_whose_nodes_lead_nowhere_is_refused():
    boosted = HistGradientBoostingClassifier(max_iter=3).fit(ROWS, LABELS)
    boosted._predictors[1][0].nodes["left"][0] = 10_000

    with pytest.raises(ArtifactError, match="expected trees of 5 columns"):
        load_estimator(save_estimator(boosted))
