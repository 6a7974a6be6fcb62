"""Local intrinsic dimensionality of every layer's activations (Ma et al., ICLR 2018).

Their estimate from the distances to the nearest of some clean images (equation 4 there), weighed by a logistic
regression. The clean images compared with are those of one half of the fitting split, fixed once; the regression is
fitted on the other half: an attacked image is never compared with its own clean twin, which in published code tells
the two apart by itself.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from detector.baselines.activations import ActivationReader
from detector.baselines.baseline import Observed
from detector.baselines.torch_score import TorchScore, regression_on, squared_distances
from detector.paths.encoder import Floats

NEIGHBOURS, REFERENCES = 20, 500


class LocalDimensions:
    """A logistic regression on each layer's local intrinsic dimensionality."""

    name, sees, images = "LID", "activations", None

    def __init__(self, reader: ActivationReader) -> None:
        self._reader = reader

    def observe(self, images: Tensor) -> Floats:
        """Class logits and activations."""
        return self._reader.rows(images)

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> TorchScore:
        """Keep the references, then weigh the layers."""
        kept = clean.ids % 2 == 0
        references = self._reader.by_layer(torch.from_numpy(clean.rows[kept][:REFERENCES]))

        def dimensions(rows: Tensor) -> Tensor:
            parts = self._reader.by_layer(rows)
            return torch.stack([local_dimension(parts[name], of) for name, of in references.items()], dim=1)

        others = {name: part.at(part.ids % 2 == 1) for name, part in attacked.items()}
        return regression_on(dimensions, self._reader.trace, clean.at(~kept), others)


def local_dimension(points: Tensor, references: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """-1 / mean(log(r_i / r_k)) over the k nearest references, `(points,)`.

    Args:
        points: `(points, channels)`.
        references: `(references, channels)`.
        neighbours: k, at most as many as there are references.
    """
    points, references = points.double(), references.to(points.device).double()
    squared = squared_distances(points, references)
    nearest = squared.topk(min(neighbours, len(references)), dim=1, largest=False).values.clamp_min(1e-12).sqrt()
    slope = (nearest / nearest[:, -1:]).log().mean(dim=1)
    return -1 / slope.clamp_max(-1e-6)
