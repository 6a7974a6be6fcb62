"""Density of the last hidden layer among clean images of the predicted class (Feinman et al., 2017).

Their Gaussian kernel, on the activations that the last linear layer reads; the bandwidth, which they tuned for each
data set, is the one under which clean images of the other half of the fitting split are most likely.
"""

from collections.abc import Mapping

import numpy as np
from sklearn.neighbors import KernelDensity
from torch import Tensor

from detector.baselines.activations import HEAD, ActivationReader
from detector.baselines.baseline import Observed
from detector.paths.encoder import Floats
from detector.scoring.compiled_score import Score
from detector.scoring.thresholds import Scores

BANDWIDTHS = (0.1, 0.26, 0.5, 1.0, 2.0)  # in standard deviations of a column, on average; theirs for CIFAR-10 is 0.26


class KernelDensities:
    """Suspicious where clean images of the same predicted class are rare."""

    name, sees, images = "kernel density", "activations", None

    def __init__(self, reader: ActivationReader) -> None:
        self._reader = reader

    def observe(self, images: Tensor) -> Floats:
        """Class logits and activations."""
        return self._reader.rows(images)

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> Score:  # noqa: ARG002
        """Learn the densities; attacked images are not needed."""
        hidden = self._hidden(clean.rows)
        spread = float(hidden.std(axis=0).mean()) or 1.0
        labels, odd = self._reader.logits(clean.rows).argmax(axis=1), clean.ids % 2 == 1
        classes = range(self._reader.classes)

        def densities(bandwidth: float, kept: Floats, of: Floats) -> dict[int, KernelDensity]:
            return {
                label: KernelDensity(bandwidth=bandwidth * spread).fit(kept[of == label])
                for label in classes
                if (of == label).any()
            }

        def likelihood(bandwidth: float) -> float:
            found = densities(bandwidth, hidden[~odd], labels[~odd])
            return sum(
                float(found[label].score_samples(hidden[odd & (labels == label)]).sum())
                for label in found
                if (odd & (labels == label)).any()
            )

        chosen = max(BANDWIDTHS, key=likelihood)
        found = densities(chosen, hidden, labels)

        def score(rows: Floats) -> Scores:
            predicted, values = self._reader.logits(rows).argmax(axis=1), self._hidden(rows)
            scores = np.full(len(rows), np.finfo(np.float64).max / 2)  # of a class that no clean image is of
            for label, density in found.items():
                if (predicted == label).any():
                    scores[predicted == label] = -density.score_samples(values[predicted == label])
            return scores

        return score

    def _hidden(self, rows: Floats) -> Floats:
        return self._reader.by_layer(rows)[HEAD]
