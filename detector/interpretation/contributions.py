"""What each column of a detector's features adds to a score: parts that sum to it.

For a linear classifier they are exact: weight times how far the column lies from its mean over the images that the
classifier was fitted on. Where each attack has a weighted sum of its own, they are integrated gradients from the means
to the image (Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017): what the attacks' sums give
the column, weighed by how much each attack counts on the way. For trees they are Shapley values by the kept library
`shap` (Lundberg et al., "From local explanations to global understanding with explainable AI for trees", 2020). The
scores of other classifiers are no sums: nothing is said of their columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from detector.interpretation.census import Doubles
from detector.paths.encoder import Floats
from detector.scoring.classifier import FalseAlarmClassifier

_BOOSTED = (GradientBoostingClassifier, HistGradientBoostingClassifier)
_FORESTS = (ExtraTreesClassifier, RandomForestClassifier)


@dataclass(frozen=True, slots=True)
class Contributions:
    """A score in parts: `base` and the `parts` of a row sum to it.

    Attributes:
        base: the score of an average image, `(images,)`; the score itself where it is no sum.
        parts: what each column adds, `(images, columns)`; 0 where the score is no sum.
        method: how they were found, for a person.
    """

    base: Doubles
    parts: Doubles
    method: str


Contribute = Callable[[Floats, Doubles], Contributions]


def contributions_of(classifier: FalseAlarmClassifier) -> Contribute:
    """Rows `(images, columns)` and their scores `(images,)` -> the parts of these scores."""
    fitted = classifier.estimator_
    steps: list[BaseEstimator] = [step for _, step in fitted.steps] if isinstance(fitted, Pipeline) else [fitted]
    linear = _linear_form(steps)
    if linear is not None:
        weights, mean, base = linear
        return lambda rows, _: Contributions(
            np.full(len(rows), base), (np.asarray(rows, np.float64) - mean) * weights, "exact, linear"
        )
    lines = _lines_form(steps)
    if lines is not None:
        return _lines_contributions(*lines)
    if isinstance(steps[-1], (*_BOOSTED, *_FORESTS)):
        return _tree_contributions(steps)
    return _none(f"no parts: the scores of {type(steps[-1]).__name__} are no sums")


def _linear_form(
    steps: Sequence[BaseEstimator],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float] | None:
    """Weight and mean of each column, and the score of the means; None where the classifier is not linear."""
    *before, last = steps
    if not hasattr(last, "coef_") or len(before) > 1 or not all(isinstance(step, StandardScaler) for step in before):
        return None
    if len(np.atleast_2d(last.coef_)) > 1:
        return None
    weights, intercept = np.asarray(last.coef_, np.float64)[0], float(np.ravel(last.intercept_)[0])
    if not before:
        return weights, np.zeros_like(weights), intercept
    scaler = before[0]
    if not (scaler.with_mean and scaler.with_std):
        return None
    # Standardised columns are 0 at their means, so that the score there is the intercept.
    return weights / scaler.scale_, np.asarray(scaler.mean_, np.float64), intercept


def _lines_form(steps: Sequence[BaseEstimator]) -> tuple[Doubles, Doubles, Doubles] | None:
    """Of a logistic regression of more than two classes on standardised columns: how far each class's sum lies above
    the first one's, as weights `(classes - 1, columns)` and value at the columns' means `(classes - 1,)`; and these
    means, `(columns,)`. None for any other classifier."""
    match steps:
        case [StandardScaler(with_mean=True, with_std=True) as scaler, LogisticRegression() as model] if (
            len(model.coef_) > 1
        ):
            weights = np.asarray(model.coef_[1:] - model.coef_[:1], np.float64) / scaler.scale_
            at_means = np.asarray(model.intercept_[1:] - model.intercept_[:1], np.float64)
            return weights, at_means, np.asarray(scaler.mean_, np.float64)
        case _:
            return None


def _lines_contributions(weights: Doubles, at_means: Doubles, means: Doubles) -> Contribute:
    places, shares = np.polynomial.legendre.leggauss(64)  # of an integral over [-1, 1]
    places, shares = (places + 1) / 2, shares / 2
    base = float(np.logaddexp.reduce(at_means))

    def contribute(rows: Floats, scores: Doubles) -> Contributions:
        away = np.asarray(rows, np.float64) - means
        further = away @ weights.T
        sums = at_means + places[:, None, None] * further  # (places, images, attacks)
        counts = np.exp(sums - np.logaddexp.reduce(sums, axis=2, keepdims=True))
        parts = away * (np.tensordot(shares, counts, axes=1) @ weights)
        # What the 64 places miss of the integral.
        found = parts.sum(axis=1)
        factor = np.divide(scores - base, found, out=np.ones_like(found), where=np.abs(found) > 1e-12)
        return Contributions(np.full(len(rows), base), parts * factor[:, None], "integrated gradients")

    return contribute


def _tree_contributions(steps: Sequence[BaseEstimator]) -> Contribute:
    *before, last = steps
    try:
        import shap
    except ModuleNotFoundError:
        return _none("no parts: those of trees want the package shap (pathguard[explain])")
    explainer = shap.TreeExplainer(last)
    base = float(np.ravel(explainer.expected_value)[-1])
    # A forest's trees add up to a share, while the score is its log-odds: the parts are stretched to sum to that.
    stretched = isinstance(last, _FORESTS)

    def contribute(rows: Floats, scores: Doubles) -> Contributions:
        for step in before:
            rows = step.transform(rows)
        parts = np.asarray(explainer.shap_values(rows), np.float64)
        if parts.ndim == 3:  # of both classes
            parts = parts[:, :, 1]
        bases = np.full(len(parts), base)
        if stretched:
            bases[:] = np.log(np.clip(base, 1e-9, 1)) - np.log(np.clip(1 - base, 1e-9, 1))
        sums = parts.sum(axis=1)
        factor = np.divide(scores - bases, sums, out=np.ones_like(sums), where=np.abs(sums) > 1e-12)
        return Contributions(bases, parts * factor[:, None], "TreeSHAP, in log-odds" if stretched else "TreeSHAP")

    return contribute


def _none(method: str) -> Contribute:
    return lambda rows, scores: Contributions(scores.astype(np.float64), np.zeros(rows.shape), method)
