"""Density of the last hidden layer among clean images of the predicted class (Feinman et al., 2017).

Their Gaussian kernel, on the activations that the last linear layer reads; the bandwidth, which they tuned for each
data set, is the one under which clean images of the other half of the fitting split are most likely.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from detector.baselines.activations import HEAD, ActivationReader
from detector.baselines.baseline import Observed
from detector.baselines.torch_score import TorchScore, squared_distances
from detector.paths.encoder import Floats

UNKNOWN = 1e12  # the score where no clean image is of the predicted class: above that of any other image
BANDWIDTHS = (0.1, 0.26, 0.5, 1.0, 2.0)  # in standard deviations of a column, on average; theirs for CIFAR-10 is 0.26


class KernelDensities:
    """Suspicious where clean images of the same predicted class are rare."""

    name, sees, images = "kernel density", "activations", None

    def __init__(self, reader: ActivationReader) -> None:
        self._reader = reader

    def observe(self, images: Tensor) -> Floats:
        """Class logits and activations."""
        return self._reader.rows(images)

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> TorchScore:  # noqa: ARG002
        """Learn the densities; attacked images are not needed."""
        rows = torch.from_numpy(clean.rows)
        hidden, labels = self._hidden(rows), self._reader.logits(rows).argmax(dim=1)
        odd = torch.from_numpy(clean.ids % 2 == 1)
        spread = float(hidden.std(dim=0, correction=0).mean()) or 1.0

        def of_classes(chosen: Tensor) -> dict[int, Tensor]:
            return {int(label): hidden[chosen & (labels == label)] for label in labels[chosen].unique()}

        halves = of_classes(~odd), of_classes(odd)

        def likelihood(bandwidth: float) -> float:
            known, others = halves
            return sum(
                float(log_density(others[label], known[label], bandwidth * spread).sum())
                for label in known
                if label in others
            )

        width, found = spread * max(BANDWIDTHS, key=likelihood), of_classes(torch.ones_like(odd))

        def score(rows: Tensor) -> Tensor:
            predicted, values = self._reader.logits(rows).argmax(dim=1), self._hidden(rows)
            scores = torch.full_like(values[:, 0], UNKNOWN)
            for label, kept in found.items():
                mine = predicted == label
                scores[mine] = -log_density(values[mine], kept, width)
            return scores

        return TorchScore(score, self._reader.trace)

    def _hidden(self, rows: Tensor) -> Tensor:
        return self._reader.by_layer(rows)[HEAD].double()


def log_density(points: Tensor, kept: Tensor, bandwidth: float) -> Tensor:
    """Log of the mean of Gaussians around `kept`, at `points`, `(points,)`.

    Args:
        points: `(points, columns)`.
        kept: at least one, `(kept, columns)`.
        bandwidth: standard deviation of each Gaussian in each column.
    """
    kept = kept.to(points.device)
    squared = squared_distances(points, kept)
    unit = kept.shape[1] * math.log(bandwidth * math.sqrt(2 * math.pi)) + math.log(len(kept))
    return (-0.5 * squared / bandwidth**2).logsumexp(dim=1) - unit
