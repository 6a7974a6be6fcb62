"""What each column of a detector's features adds to a score: parts that sum to it.

For a linear classifier they are exact: weight times how far the column lies from its mean over the images that the
classifier was fitted on. Where each attack has a weighted sum of its own, they are integrated gradients from the means
to the image (Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017): what the attacks' sums give
the column, less what those of benign kinds give it, each weighed by how much it counts on the way; through a network's
hidden layer likewise. For trees they are Shapley values by the kept library `shap` (Lundberg et al., "From local
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
from detector.scoring.sums import WeightedSums, weighted_sums

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
    sums = weighted_sums(fitted)
    if sums is not None and isinstance(steps[0], StandardScaler):
        return _sums_contributions(sums, np.asarray(steps[0].mean_, np.float64))
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


def _sums_contributions(sums: WeightedSums, means: Doubles) -> Contribute:
    places, shares = np.polynomial.legendre.leggauss(64)  # of an integral over [-1, 1]
    places, shares = (places + 1) / 2, shares / 2
    at_means, benign = means @ sums.weights + sums.offsets, sums.benign
    base = float(sums.score(means[None])[0])
    attacks = np.arange(sums.count) >= benign

    def contribute(rows: Floats, scores: Doubles) -> Contributions:
        away = np.asarray(rows, np.float64) - means
        of_columns = at_means + places[:, None, None] * (away @ sums.weights)  # (places, images, sums or units)
        reached = sums.behind(of_columns)
        of_attacks = np.logaddexp.reduce(reached[..., benign:], axis=2, keepdims=True)
        of_benign = np.logaddexp.reduce(reached[..., :benign], axis=2, keepdims=True, initial=0.0)
        counts = np.where(attacks, np.exp(reached - of_attacks), -np.exp(reached - of_benign))
        if sums.hidden is not None:
            counts = (counts @ sums.hidden.weights.T) * (of_columns > 0)
        parts = away * (np.tensordot(shares, counts, axes=1) @ sums.weights.T)
        # What the 64 places miss of the integral: little, but more where units set in between them.
        missed, sizes = scores - base - parts.sum(axis=1), np.abs(parts)
        total = sizes.sum(axis=1)
        parts += sizes * np.divide(missed, total, out=np.zeros_like(missed), where=total > 0)[:, None]
        return Contributions(np.full(len(rows), base), parts, "integrated gradients")

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
