"""A fitted scikit-learn classifier -> a function that scores rows at the cost of the arithmetic alone.

scikit-learn checks and copies its input at every step of a pipeline, which for one row takes many times as long as the
arithmetic. Standardisation and a linear model fold into one matrix product instead, a small network into one for each
of its layers, and trees are walked side by side (`compiled_trees`); any other classifier is called as it is.
"""

from collections.abc import Callable

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from detector.paths.encoder import Floats
from detector.scoring.classifier import FalseAlarmClassifier, log_odds
from detector.scoring.compiled_trees import compile_trees
from detector.scoring.thresholds import Scores

Score = Callable[[Floats], Scores]


def compile_score(estimator: BaseEstimator) -> Score:
    """Rows `(images, features)` -> how suspicious each is, `(images,)`: `decision_function` of a fitted classifier.

    Of one that has none, and of a `FalseAlarmClassifier` around such a one, the log-odds of the positive class.

    Equal to scikit-learn's own answer up to the rounding of float64.
    """
    inner = estimator.estimator_ if isinstance(estimator, FalseAlarmClassifier) else estimator
    steps = [step for _, step in inner.steps] if isinstance(inner, Pipeline) else [inner]
    match steps:
        case [StandardScaler(with_mean=True, with_std=True) as scaler, LogisticRegression() as model]:
            weights = model.coef_[0] / scaler.scale_
            offset = float(model.intercept_[0] - weights @ scaler.mean_)
            return lambda rows: np.asarray(rows, np.float64) @ weights + offset
        case [StandardScaler(with_mean=True, with_std=True) as scaler, MLPClassifier(activation="relu") as network]:
            return _folded_network(scaler, network)
        case [model] if (walk := compile_trees(model)) is not None:
            # A forest answers with shares, boosting with scores.
            return walk if hasattr(model, "decision_function") else lambda rows: log_odds(walk(rows))
        case _ if isinstance(estimator, FalseAlarmClassifier):
            return estimator.score_samples
        case _:
            return lambda rows: np.asarray(estimator.decision_function(rows), np.float64)


def _folded_network(scaler: StandardScaler, network: MLPClassifier) -> Score:
    first = np.asarray(network.coefs_[0], np.float64) / scaler.scale_[:, None]
    layers = [(first, network.intercepts_[0] - scaler.mean_ @ first)]
    layers += [(weights.astype(np.float64), offset) for weights, offset in
               zip(network.coefs_[1:], network.intercepts_[1:], strict=True)]  # fmt: skip
    end = float(log_odds(1.0))

    def score(rows: Floats) -> Scores:
        values = np.asarray(rows, np.float64)
        for weights, offset in layers[:-1]:
            values = np.maximum(values @ weights + offset, 0)
        weights, offset = layers[-1]
        clipped: Scores = np.clip((values @ weights + offset)[:, 0], -end, end)
        return clipped

    return score
