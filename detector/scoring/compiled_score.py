"""A fitted scikit-learn classifier -> a function that scores rows at the cost of the arithmetic alone.

scikit-learn checks and copies its input at every step of a pipeline, which for one row takes many times as long as the
arithmetic. Standardisation and linear models fold into one matrix product instead, a small network into two, and trees
are walked side by side (`compiled_trees`); any other classifier is called as it is. What folds may also be computed by
the engine that computes the path (`folded_score`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline

from detector.errors import ArtifactError
from detector.paths.encoder import Evidence, Floats
from detector.paths.features import FEATURES, PathFeatures
from detector.scoring.classifier import FalseAlarmClassifier, log_odds
from detector.scoring.compiled_trees import compile_trees
from detector.scoring.sums import Doubles, WeightedSums, weighted_sums
from detector.scoring.thresholds import Scores

Score = Callable[[Floats], Scores]


@dataclass(frozen=True, slots=True, eq=False)
class FoldedScore:
    """A score that weighted sums of features give.

    Attributes:
        sums: of all columns.
        features: what gives the columns.
    """

    sums: WeightedSums
    features: PathFeatures

    @property
    def weights(self) -> Mapping[str, Doubles]:
        """Kind of features (`detector.paths.features.FEATURES`) -> its columns' weights, `(columns, sums or units)`."""
        kinds = self.features.kinds
        widths = [len(FEATURES[kind].columns(kind, self.features.shape)) for kind in kinds]
        return dict(zip(kinds, np.split(self.sums.weights, np.cumsum(widths)[:-1]), strict=True))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image: of the sums, and of likelihoods for every class."""
        widths = np.array(list(self.features.shape.layers.values()))
        of_classes = self.features.shape.classes * int(widths.sum())
        total = self.sums.macs
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

    Equal to scikit-learn's own answer up to the rounding of float64; where scikit-learn gives shares alone, it cannot
    tell apart those within 1e-9 of an end, and this can.
    """
    fitted = estimator.estimator_ if isinstance(estimator, FalseAlarmClassifier) else estimator
    if (sums := weighted_sums(fitted)) is not None:
        return sums.score
    match [step for _, step in fitted.steps] if isinstance(fitted, Pipeline) else [fitted]:
        case [model] if (walk := compile_trees(model)) is not None:
            # A forest answers with shares, boosting with scores.
            return walk if hasattr(model, "decision_function") else lambda rows: log_odds(walk(rows))
        case _ if isinstance(estimator, FalseAlarmClassifier):
            return estimator.score_samples
        case _:
            return lambda rows: np.asarray(estimator.decision_function(rows), np.float64)


def folded_score(estimator: BaseEstimator, features: PathFeatures) -> FoldedScore | None:
    """The same as weighted sums, for an engine that computes them with the path; None of another classifier.

    Args:
        estimator: a fitted classifier.
        features: fitted; what it reads.

    Raises:
        ArtifactError: the classifier reads other columns, or its layers do not fit each other.
    """
    fitted = estimator.estimator_ if isinstance(estimator, FalseAlarmClassifier) else estimator
    sums, columns = weighted_sums(fitted), len(features.columns())
    if sums is None:
        return None
    if len(sums.weights) != columns:
        raise ArtifactError(f"expected a classifier of the {columns} columns of its features, got {len(sums.weights)}")
    return FoldedScore(sums, features)
