"""A fitted scikit-learn classifier -> a function that scores rows at the cost of the arithmetic alone.

scikit-learn checks and copies its input at every step of a pipeline, which for one row takes many times as long as the
arithmetic. Standardisation and linear models fold into one matrix product instead, a small network into one for each
of its layers, and trees are walked side by side (`compiled_trees`); any other classifier is called as it is. A linear
model of bits, logits and margins may also be computed by the engine that computes them (`linear_score`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from detector.paths.encoder import Evidence, Floats
from detector.paths.features import FEATURES, PathFeatures
from detector.scoring.classifier import FalseAlarmClassifier, log_odds
from detector.scoring.compiled_trees import compile_trees
from detector.scoring.thresholds import Scores

Score = Callable[[Floats], Scores]
Weights = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LinearScore:
    """A score that is a weighted sum of features.

    Attributes:
        offset: the score where all columns are zero.
        weights: kind of features (`detector.paths.features.FEATURES`) -> weight of each of its columns.
        features: what gives the columns.
    """

    offset: float
    weights: Mapping[str, Weights]
    features: PathFeatures

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image: of the sum, and of likelihoods for every class."""
        widths = np.array(list(self.features.layers.values()))
        of_classes = self.features.classes * int(widths.sum())
        total = sum(len(weights) for weights in self.weights.values())
        if "path-likelihoods" in self.weights:
            total += of_classes
        if "gate-likelihoods" in self.weights:
            total += of_classes + int((widths**2).sum())  # each layer is whitened first
        return total

    def of(self, evidence: Evidence) -> Scores:
        """The score of each image, `(images,)`, as NumPy sums it."""
        weights = np.concatenate([self.weights[kind] for kind in self.features.kinds])
        scores: Scores = np.asarray(self.features.of(evidence), np.float64) @ weights + self.offset
        return scores


def compile_score(estimator: BaseEstimator) -> Score:
    """Rows `(images, features)` -> how suspicious each is, `(images,)`: `decision_function` of a fitted classifier.

    Of one that has none, and of a `FalseAlarmClassifier` around such a one, the log-odds of the positive class; of one
    of more than two classes, those of all classes but the first.

    Equal to scikit-learn's own answer up to the rounding of float64.
    """
    steps = _steps_of(estimator)
    match steps:
        case [StandardScaler(with_mean=True, with_std=True) as scaler, LogisticRegression() as model]:
            if len(model.coef_) > 1:
                return _folded_lines(scaler, model)
            weights, offset = _folded_line(scaler, model)
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


def linear_score(estimator: BaseEstimator, features: PathFeatures) -> LinearScore | None:
    """The same as a weighted sum, for an engine that computes it with the path; None of another classifier.

    Args:
        estimator: a fitted binary classifier.
        features: fitted; what it reads.
    """
    match _steps_of(estimator):
        case [StandardScaler(with_mean=True, with_std=True) as scaler, LogisticRegression() as model] if (
            len(model.coef_) == 1
        ):
            weights, offset = _folded_line(scaler, model)
            kinds = features.kinds
            widths = [len(FEATURES[kind].columns(kind, features.classes, features.layers)) for kind in kinds]
            pieces = np.split(weights, np.cumsum(widths)[:-1])
            of = {kind: np.ascontiguousarray(piece) for kind, piece in zip(kinds, pieces, strict=True)}
            return LinearScore(offset, of, features)
        case _:
            return None


def _steps_of(estimator: BaseEstimator) -> list[BaseEstimator]:
    inner = estimator.estimator_ if isinstance(estimator, FalseAlarmClassifier) else estimator
    return [step for _, step in inner.steps] if isinstance(inner, Pipeline) else [inner]


def _folded_line(scaler: StandardScaler, model: LogisticRegression) -> tuple[Weights, float]:
    weights = model.coef_[0] / scaler.scale_
    return weights, float(model.intercept_[0] - weights @ scaler.mean_)


def _folded_lines(scaler: StandardScaler, model: LogisticRegression) -> Score:
    """Of more than two classes: one weighted sum for each but the first, how far it lies above that of the first."""
    lead = np.asarray(model.coef_[1:] - model.coef_[:1], np.float64) / scaler.scale_
    offsets = np.asarray(model.intercept_[1:] - model.intercept_[:1], np.float64) - lead @ scaler.mean_
    weights = np.ascontiguousarray(lead.T)
    return lambda rows: np.logaddexp.reduce(np.asarray(rows, np.float64) @ weights + offsets, axis=1)


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
