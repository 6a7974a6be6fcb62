"""Distance to the nearest class in every layer (Lee et al., "A Simple Unified Framework ...", NeurIPS 2018).

Each layer's confidence is that of the nearest class mean under one covariance for all classes (equation 2 there); a
logistic regression weighs the layers. Their step along the gradient before the measurement is left out: it costs a
backward pass an image and changes little against attacks in their own table.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from detector.baselines.activations import ActivationReader
from detector.baselines.baseline import Observed, fitted_on
from detector.paths.encoder import Floats
from detector.paths.likelihoods import gaussian_likelihoods, learn_gate_gaussians
from detector.scoring.compiled_score import Score


class Mahalanobis:
    """A logistic regression on each layer's distance to the nearest class."""

    name, sees, images = "Mahalanobis", "activations", None

    def __init__(self, reader: ActivationReader) -> None:
        self._reader = reader

    def observe(self, images: Tensor) -> Floats:
        """Class logits and activations."""
        return self._reader.rows(images)

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> Score:
        """Learn class means and covariances from the clean images, then weigh the layers."""
        reader = self._reader
        learnt = learn_gate_gaussians(reader.logits(clean.rows), reader.activations(clean.rows), reader.layers)

        def confidences(rows: Floats) -> Floats:
            likely = gaussian_likelihoods(reader.activations(rows), learnt, reader.layers)
            return np.stack([of_class.max(axis=1) for of_class in likely], axis=1)

        return fitted_on(confidences, clean, attacked)
