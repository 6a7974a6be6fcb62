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

from detector.classifier import FalseAlarmClassifier
from detector.encoder import Floats
from detector.thresholds import Scores

Score = Callable[[Floats], Scores]


def compile_score(estimator: BaseEstimator) -> Score:
    """Rows `(images, features)` -> `decision_function` of a fitted binary classifier, `(images,)`.

    Of a `FalseAlarmClassifier`, it is the one of the estimator inside, which is its `score_samples`.

    Equal to scikit-learn's own answer up to the rounding of float64.
    """
    if isinstance(estimator, FalseAlarmClassifier):
        estimator = estimator.estimator_
    steps = [step for _, step in estimator.steps] if isinstance(estimator, Pipeline) else [estimator]
    match steps:
        case [StandardScaler() as scaler, LogisticRegression() as model]:
            weights = model.coef_[0] / scaler.scale_
            offset = float(model.intercept_[0] - weights @ scaler.mean_)
            return lambda rows: np.asarray(rows, np.float64) @ weights + offset
        case _:
            return lambda rows: np.asarray(estimator.decision_function(rows), np.float64)
