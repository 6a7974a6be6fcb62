"""Local intrinsic dimensionality of every layer's activations (Ma et al., ICLR 2018).

Their estimate from the distances to the nearest of some clean images (equation 4 there), weighed by a logistic
regression. The clean images compared with are those of one half of the fitting split, fixed once; the regression is
fitted on the other half: an attacked image is never compared with its own clean twin, which in published code tells
the two apart by itself.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from detector.baselines.activations import ActivationReader
from detector.baselines.baseline import Observed, fitted_on
from detector.paths.encoder import Floats
from detector.scoring.compiled_score import Score

NEIGHBOURS, REFERENCES = 20, 500


class LocalDimensions:
    """A logistic regression on each layer's local intrinsic dimensionality."""

    name, sees, images = "LID", "activations", None

    def __init__(self, reader: ActivationReader) -> None:
        self._reader = reader

    def observe(self, images: Tensor) -> Floats:
        """Class logits and activations."""
        return self._reader.rows(images)

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> Score:
        """Keep the references, then weigh the layers."""
        kept = clean.ids % 2 == 0
        references = {name: part[:REFERENCES] for name, part in self._reader.by_layer(clean.rows[kept]).items()}

        def dimensions(rows: Floats) -> Floats:
            parts = self._reader.by_layer(rows)
            return np.stack([local_dimension(parts[name], reference) for name, reference in references.items()], axis=1)

        others = {name: part.at(part.ids % 2 == 1) for name, part in attacked.items()}
        return fitted_on(dimensions, clean.at(~kept), others)


def local_dimension(points: Floats, references: Floats, neighbours: int = NEIGHBOURS) -> Floats:
    """-1 / mean(log(r_i / r_k)) over the k nearest references, `(points,)`.

    Args:
        points: `(points, channels)`.
        references: `(references, channels)`.
        neighbours: k, at most as many as there are references.
    """
    points, references = points.astype(np.float64), references.astype(np.float64)
    squared = (points**2).sum(axis=1, keepdims=True) - 2 * points @ references.T + (references**2).sum(axis=1)
    count = min(neighbours, len(references))
    nearest = np.sqrt(np.maximum(np.sort(np.partition(squared, count - 1, axis=1)[:, :count], axis=1), 1e-12))
    slope = np.log(nearest / nearest[:, -1:]).mean(axis=1)
    return np.asarray(-1 / np.minimum(slope, -1e-6), np.float32)
