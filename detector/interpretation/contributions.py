"""What each column of a detector's features adds to a score: parts that sum to it.

For a linear classifier they are exact: weight times how far the column lies from its mean over the images that the
classifier was fitted on. For trees they are Shapley values by the kept library `shap` (Lundberg et al., "From local
explanations to global understanding with explainable AI for trees", 2020). The scores of other classifiers are no sums:
nothing is said of their columns.
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
    weights, intercept = np.asarray(last.coef_, np.float64)[0], float(np.ravel(last.intercept_)[0])
    if not before:
        return weights, np.zeros_like(weights), intercept
    scaler = before[0]
    if not (scaler.with_mean and scaler.with_std):
        return None
    # Standardised columns are 0 at their means, so that the score there is the intercept.
    return weights / scaler.scale_, np.asarray(scaler.mean_, np.float64), intercept


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
