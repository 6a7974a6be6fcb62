"""A fitted scikit-learn classifier -> a function that scores rows at the cost of the arithmetic alone.

scikit-learn checks and copies its input at every step of a pipeline, which for one row takes many times as long as the
arithmetic. Standardisation and linear models fold into one matrix product instead, a small network into one for each
of its layers, and trees are walked side by side (`compiled_trees`); any other classifier is called as it is. A linear
model of bits, logits and margins may also be computed by the engine that computes them (`linear_score`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from detector.paths.encoder import Evidence, Floats
from detector.paths.features import FEATURES, PathFeatures
from detector.scoring.classifier import FalseAlarmClassifier, log_odds
from detector.scoring.compiled_trees import compile_trees
from detector.scoring.sums import Doubles, WeightedSums, weighted_sums
from detector.scoring.thresholds import Scores

Score = Callable[[Floats], Scores]


@dataclass(frozen=True, slots=True, eq=False)
class LinearScore:
    """A score that weighted sums of features give.

    Attributes:
        sums: of all columns.
        features: what gives the columns.
    """

    sums: WeightedSums
    features: PathFeatures

    @property
    def weights(self) -> Mapping[str, Doubles]:
        """Kind of features (`detector.paths.features.FEATURES`) -> weights of its columns, `(columns, sums)`."""
        kinds, of = self.features.kinds, self.features
        widths = [len(FEATURES[kind].columns(kind, of.classes, of.layers)) for kind in kinds]
        return dict(zip(kinds, np.split(self.sums.weights, np.cumsum(widths)[:-1]), strict=True))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image: of the sums, and of likelihoods for every class."""
        widths = np.array(list(self.features.layers.values()))
        of_classes = self.features.classes * int(widths.sum())
        total = self.sums.weights.size
        if "path-likelihoods" in self.features.kinds:
            total += of_classes
        if "gate-likelihoods" in self.features.kinds:
            total += of_classes + int((widths**2).sum())  # each layer is whitened first
        return total

    def of(self, evidence: Evidence) -> Scores:
        """The score of each image, `(images,)`, as NumPy sums it."""
        return self.sums.score(self.features.of(evidence))


def compile_score(estimator: BaseEstimator) -> Score:
    """Rows `(images, features)` -> how suspicious each is, `(images,)`: `decision_function` of a fitted classifier.

    Of one that has none, and of a `FalseAlarmClassifier` around such a one, the log-odds of the positive class; of one
    of more than two classes, those of attacks (`WeightedSums.score`).

    Equal to scikit-learn's own answer up to the rounding of float64.
    """
    fitted = estimator.estimator_ if isinstance(estimator, FalseAlarmClassifier) else estimator
    if (sums := weighted_sums(fitted)) is not None:
        return sums.score
    match [step for _, step in fitted.steps] if isinstance(fitted, Pipeline) else [fitted]:
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
    """The same as weighted sums, for an engine that computes them with the path; None of another classifier.

    Args:
        estimator: a fitted classifier.
        features: fitted; what it reads.
    """
    fitted = estimator.estimator_ if isinstance(estimator, FalseAlarmClassifier) else estimator
    sums = weighted_sums(fitted)
    return None if sums is None else LinearScore(sums, features)


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
