"""A fitted scikit-learn classifier -> a function that scores rows at the cost of the arithmetic alone.

scikit-learn checks and copies its input at every step of a pipeline, which for one row takes many times as long as the
arithmetic. Standardisation and a linear model fold into one matrix product instead; any
other classifier is called as it is.
"""

from collections.abc import Callable

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from detector.paths.encoder import Floats
from detector.scoring.classifier import FalseAlarmClassifier
from detector.scoring.thresholds import Scores

Score = Callable[[Floats], Scores]


def compile_score(estimator: BaseEstimator) -> Score:
    """Rows `(images, features)` -> `decision_function` of a fitted binary classifier, `(images,)`.

    Of a `FalseAlarmClassifier`, it is its `score_samples`: that of the estimator inside, or the log-odds of one that
    has no `decision_function`.

    Equal to scikit-learn's own answer up to the rounding of float64.
    """
    inner = estimator.estimator_ if isinstance(estimator, FalseAlarmClassifier) else estimator
    steps = [step for _, step in inner.steps] if isinstance(inner, Pipeline) else [inner]
    match steps:
        case [StandardScaler(with_mean=True, with_std=True) as scaler, LogisticRegression() as model]:
            weights = model.coef_[0] / scaler.scale_
            offset = float(model.intercept_[0] - weights @ scaler.mean_)
            return lambda rows: np.asarray(rows, np.float64) @ weights + offset
        case _ if isinstance(estimator, FalseAlarmClassifier):
            return estimator.score_samples
        case _:
            return lambda rows: np.asarray(estimator.decision_function(rows), np.float64)
