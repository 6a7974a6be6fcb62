"""Logistic regression as weighted sums of the columns: what engines, gradients and explanations all compute.

Of two classes there is one sum, the log-odds. Where the classifier is told which attack an image was made by, each
attack has a sum, and where it is told what else may befall an image that nobody attacks (`attacks.benign`),
each of these kinds has one too; a sum says how far its class lies above that of clean images.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from detector.scoring.thresholds import Scores

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class WeightedSums:
    """Sums of columns, and the score that they give together.

    Attributes:
        weights: of each column in each sum, `(columns, sums)`.
        offsets: the sums where all columns are zero, `(sums,)`.
        benign: so many sums, the first ones, are of kinds of images that are not attacked; the others are of attacks.
    """

    weights: Doubles
    offsets: Doubles
    benign: int = 0

    def score(self, rows: npt.ArrayLike) -> Scores:
        """Rows `(images, columns)` -> log-odds of any attack against clean and other benign images, `(images,)`."""
        return odds_of_sums(np.asarray(rows, np.float64) @ self.weights + self.offsets, self.benign)


def odds_of_sums(sums: Doubles, benign: int) -> Scores:
    """`log(Σ exp(attacks' sums)) - log(1 + Σ exp(benign sums))`; the 1 is that of clean images.

    Args:
        sums: `(images, sums)`.
        benign: so many of them, the first ones, are benign.

    Returns:
        `(images,)`.
    """
    scores: Scores = np.logaddexp.reduce(sums[:, benign:], axis=1)
    return scores - np.logaddexp.reduce(sums[:, :benign], axis=1, initial=0.0) if benign else scores


class TorchSums(nn.Module):
    """`WeightedSums.score` of tensors, with a gradient."""

    def __init__(self, sums: WeightedSums) -> None:
        """The same sums, on the processor until it is moved."""
        super().__init__()
        self.benign = sums.benign
        self.register_buffer("weights", torch.from_numpy(sums.weights))
        self.register_buffer("offsets", torch.from_numpy(sums.offsets))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows `(images, columns)` -> scores, `float64`, `(images,)`."""
        sums = rows.double() @ self.get_buffer("weights") + self.get_buffer("offsets")
        against = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, : self.benign]], dim=1)
        return sums[:, self.benign :].logsumexp(dim=1) - against.logsumexp(dim=1)


def weighted_sums(estimator: BaseEstimator) -> WeightedSums | None:
    """What a fitted logistic regression computes behind any number of standardisations; None of another classifier.

    Its classes are those of `detector.scoring.fitting.fit_classifier`: False and True, or 0 for clean images, positive
    numbers for attacks and negative ones for other benign images.
    """
    *scalers, model = [step for _, step in estimator.steps] if isinstance(estimator, Pipeline) else [estimator]
    if not isinstance(model, LogisticRegression) or not all(isinstance(scaler, StandardScaler) for scaler in scalers):
        return None
    weights, offsets = np.asarray(model.coef_, np.float64), np.asarray(model.intercept_, np.float64)
    benign = 0
    if len(weights) > 1:
        clean = benign = int(np.searchsorted(model.classes_, 0))
        weights = np.delete(weights - weights[clean], clean, axis=0)
        offsets = np.delete(offsets - offsets[clean], clean)
    for scaler in reversed(scalers):
        if scaler.with_std:
            weights = weights / scaler.scale_
        if scaler.with_mean:  # `mean_` is there without it too
            offsets = offsets - weights @ scaler.mean_
    return WeightedSums(np.ascontiguousarray(weights.T), offsets, benign)
