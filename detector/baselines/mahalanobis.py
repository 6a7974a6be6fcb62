"""Distance to the nearest class in every layer (Lee et al., "A Simple Unified Framework ...", NeurIPS 2018).

Each layer's confidence is that of the nearest class mean under one covariance for all classes (equation 2 there); a
logistic regression weighs the layers. Their step along the gradient before the measurement is left out: it costs a
backward pass an image and changes little against attacks in their own table.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from detector.baselines.activations import ActivationReader
from detector.baselines.baseline import Observed
from detector.baselines.torch_score import TorchScore, regression_on, squared_distances
from detector.paths.encoder import Floats
from detector.paths.likelihoods import learn_gate_gaussians


class Mahalanobis:
    """A logistic regression on each layer's distance to the nearest class."""

    name, sees, images = "Mahalanobis", "activations", None

    def __init__(self, reader: ActivationReader) -> None:
        self._reader = reader

    def observe(self, images: Tensor) -> Floats:
        """Class logits and activations."""
        return self._reader.rows(images)

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> TorchScore:
        """Learn class means and covariances from the clean images, then weigh the layers."""
        reader = self._reader
        arrays = learn_gate_gaussians(reader.logits(clean.rows), reader.activations(clean.rows), reader.layers)
        learnt = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
        known = learnt["known"] == 1
        centres = dict(zip(reader.layers, learnt["centre"].split(list(reader.layers.values())), strict=True))

        def confidences(rows: Tensor) -> Tensor:
            nearest = []
            for place, (name, values) in enumerate(reader.by_layer(rows).items()):
                centre, whitening, means = (
                    part.to(rows.device)
                    for part in (centres[name], learnt[f"whitening-{place}"], learnt[f"means-{place}"][known])
                )
                white = (values.double() - centre) @ whitening
                nearest.append(-0.5 * squared_distances(white, means).amin(dim=1) / values.shape[1])
            return torch.stack(nearest, dim=1)

        return regression_on(confidences, reader.trace, clean, attacked)
