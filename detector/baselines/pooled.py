"""Pooled activations of every layer and the class margins, without gates: what the path has to be better than."""

from collections.abc import Mapping

import torch
from torch import Tensor

from detector.baselines.activations import ActivationReader
from detector.baselines.baseline import Observed
from detector.baselines.torch_score import TorchScore, regression_on
from detector.paths.encoder import Floats


class PooledActivations:
    """A logistic regression on all pooled activations and on the class margins."""

    name, sees, images = "pooled activations", "activations", None

    def __init__(self, reader: ActivationReader) -> None:
        self._reader = reader

    def observe(self, images: Tensor) -> Floats:
        """Class logits and activations."""
        return self._reader.rows(images)

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> TorchScore:
        """Fit the regression."""
        return regression_on(self._columns, self._reader.trace, clean, attacked)

    def _columns(self, rows: Tensor) -> Tensor:
        ordered = self._reader.logits(rows).sort(dim=1, descending=True).values
        return torch.cat([self._reader.activations(rows), ordered[:, :1] - ordered[:, 1:]], dim=1)
