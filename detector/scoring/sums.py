"""Logistic regression and small networks as weighted sums: what engines, gradients and explanations all compute.

Of two classes there is one sum, the log-odds. Where the classifier is told which attack an image was made by, each
attack has a sum, and where it is told what else may befall an image that nobody attacks (`attacks.benign`),
each of these kinds has one too; a sum says how far its class lies above that of clean images. A logistic regression
sums the columns; a network sums the units of a hidden layer, which are rectified sums of the columns.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from detector.errors import ArtifactError
from detector.scoring.dropout_network import DropoutNetwork
from detector.scoring.thresholds import Scores

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class HiddenLayer:
    """What stands between the columns and the sums of a network.

    Attributes:
        weights: of each unit, where it is positive, in each sum, `(units, sums)`.
        offsets: the sums where all units are zero, `(sums,)`.
    """

    weights: Doubles
    offsets: Doubles


@dataclass(frozen=True, slots=True, eq=False)
class WeightedSums:
    """Sums of columns, and the score that they give together.

    Attributes:
        weights: of each column in each sum, `(columns, sums)`; where there is a hidden layer, in each of its units.
        offsets: the sums, or units, where all columns are zero, `(sums,)`.
        benign: so many sums, the first ones, are of kinds of images that are not attacked; the others are of attacks.
        hidden: of a network.
    """

    weights: Doubles
    offsets: Doubles
    benign: int = 0
    hidden: HiddenLayer | None = None

    def __post_init__(self) -> None:
        """Refuse what compiled code, which looks at no bounds, would read beyond.

        Raises:
            ArtifactError: weights and offsets do not fit each other.
        """
        fits = self.weights.shape[1:] == self.offsets.shape and 0 <= self.benign < self.count
        if self.hidden is not None:
            fits = fits and self.hidden.weights.shape == (len(self.offsets), self.count)
        if not fits:
            raise ArtifactError(
                f"expected a classifier whose layers fit each other, got weights of {self.weights.shape}, "
                f"{self.offsets.shape} offsets and the hidden layer "
                f"{None if self.hidden is None else self.hidden.weights.shape}"
            )

    @property
    def count(self) -> int:
        """How many sums there are."""
        return len(self.offsets if self.hidden is None else self.hidden.offsets)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.weights.size + (0 if self.hidden is None else self.hidden.weights.size)

    def score(self, rows: npt.ArrayLike) -> Scores:
        """Rows `(images, columns)` -> log-odds of any attack against clean and other benign images, `(images,)`."""
        return odds_of_sums(self.behind(np.asarray(rows, np.float64) @ self.weights + self.offsets), self.benign)

    def behind(self, sums: Doubles) -> Doubles:
        """Sums of columns `(..., sums or units)` -> the sums that are judged, `(..., sums)`."""
        return sums if self.hidden is None else np.maximum(sums, 0) @ self.hidden.weights + self.hidden.offsets


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
        self.benign, self.hidden = sums.benign, sums.hidden is not None
        self.register_buffer("weights", torch.from_numpy(sums.weights))
        self.register_buffer("offsets", torch.from_numpy(sums.offsets))
        if sums.hidden is not None:
            self.register_buffer("hidden_weights", torch.from_numpy(sums.hidden.weights))
            self.register_buffer("hidden_offsets", torch.from_numpy(sums.hidden.offsets))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows `(images, columns)` -> scores, `float64`, `(images,)`."""
        sums = rows.double() @ self.get_buffer("weights") + self.get_buffer("offsets")
        if self.hidden:
            sums = sums.relu() @ self.get_buffer("hidden_weights") + self.get_buffer("hidden_offsets")
        against = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, : self.benign]], dim=1)
        return sums[:, self.benign :].logsumexp(dim=1) - against.logsumexp(dim=1)


def weighted_sums(estimator: BaseEstimator) -> WeightedSums | None:
    """What a fitted logistic regression or network of one hidden layer computes, behind any number of standardisations.

    Its classes are those of `detector.scoring.fitting.fit_classifier`: False and True, or 0 for clean images, positive
    numbers for attacks and negative ones for other benign images. None of another classifier.
    """
    *scalers, model = [step for _, step in estimator.steps] if isinstance(estimator, Pipeline) else [estimator]
    model = model.network_ if isinstance(model, DropoutNetwork) else model
    if not all(isinstance(scaler, StandardScaler) for scaler in scalers):
        return None
    hidden = None
    if isinstance(model, LogisticRegression):
        weights, offsets, benign = _above_clean(model.coef_.T, model.intercept_, model.classes_)
    elif isinstance(model, MLPClassifier) and len(model.coefs_) == 2 and model.activation == "relu":
        last, at_zero, benign = _above_clean(model.coefs_[1], model.intercepts_[1], model.classes_)
        hidden = HiddenLayer(last, at_zero)
        weights, offsets = (np.asarray(array, np.float64) for array in (model.coefs_[0], model.intercepts_[0]))
    else:
        return None
    for scaler in reversed(scalers):
        if scaler.with_std:
            weights = weights / scaler.scale_[:, None]
        if scaler.with_mean:  # `mean_` is there without it too
            offsets = offsets - scaler.mean_ @ weights
    return WeightedSums(np.ascontiguousarray(weights), offsets, benign, hidden)


def _above_clean(
    weights: npt.ArrayLike, offsets: npt.ArrayLike, classes: npt.NDArray[np.generic]
) -> tuple[Doubles, Doubles, int]:
    """Weights and offsets of sums less those of class 0, which is left out, and how many of the others are benign.

    Args:
        weights: `(columns or units, sums)`; of two classes there is one sum.
        offsets: `(sums,)`.
        classes: `(sums,)`, or both.
    """
    of_all, at_zero = np.asarray(weights, np.float64), np.asarray(offsets, np.float64)
    if len(at_zero) == 1:
        return of_all, at_zero, 0
    clean = int(np.searchsorted(classes, 0))
    above = np.delete(of_all - of_all[:, [clean]], clean, axis=1)
    return above, np.delete(at_zero - at_zero[clean], clean), clean
