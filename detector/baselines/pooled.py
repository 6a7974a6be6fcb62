"""Pooled activations of every layer and the class margins, without gates: what the path has to be better than."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from detector.baselines.activations import ActivationReader
from detector.baselines.baseline import Observed, fitted_on
from detector.paths.encoder import Floats
from detector.scoring.compiled_score import Score


class PooledActivations:
    """A logistic regression on all pooled activations and on the class margins."""

    name, sees, images = "pooled activations", "activations", None

    def __init__(self, reader: ActivationReader) -> None:
        self._reader = reader

    def observe(self, images: Tensor) -> Floats:
        """Class logits and activations."""
        return self._reader.rows(images)

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> Score:
        """Fit the regression."""
        return fitted_on(self._columns, clean, attacked)

    def _columns(self, rows: Floats) -> Floats:
        ordered = np.sort(self._reader.logits(rows), axis=1)[:, ::-1]
        return np.concatenate([self._reader.activations(rows), ordered[:, :1] - ordered[:, 1:]], axis=1)
