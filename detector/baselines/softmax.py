"""How unsure the network is: the smallest baseline (Hendrycks and Gimpel, ICLR 2017)."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from detector.baselines.activations import ActivationReader
from detector.baselines.baseline import Observed
from detector.paths.encoder import Floats
from detector.scoring.compiled_score import Score
from detector.scoring.thresholds import Scores


class MaxSoftmax:
    """Suspicious where the largest probability is small; nothing is fitted."""

    name, sees, images = "max-softmax", "activations", None

    def __init__(self, reader: ActivationReader) -> None:
        self._reader = reader

    def observe(self, images: Tensor) -> Floats:
        """Class logits and activations."""
        return self._reader.rows(images)

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> Score:  # noqa: ARG002
        """The odds against the first class: as a score they order images like the largest probability does."""
        return lambda rows: _odds_against(self._reader.logits(rows))


def _odds_against(logits: Floats) -> Scores:
    ordered = np.sort(logits.astype(np.float64), axis=1)
    behind = ordered[:, :-1] - ordered[:, -1:]
    # log((1 - p) / p) = log of the sum of e^(other - first): exact also where p rounds to 1
    found: Scores = np.logaddexp.reduce(behind, axis=1)
    return found
