"""How unsure the network is: the smallest baseline (Hendrycks and Gimpel, ICLR 2017)."""

from collections.abc import Mapping

from torch import Tensor

from detector.baselines.activations import ActivationReader
from detector.baselines.baseline import Observed
from detector.baselines.torch_score import TorchScore
from detector.paths.encoder import Floats


class MaxSoftmax:
    """Suspicious where the largest probability is small; nothing is fitted."""

    name, sees, images = "max-softmax", "activations", None

    def __init__(self, reader: ActivationReader) -> None:
        self._reader = reader

    def observe(self, images: Tensor) -> Floats:
        """Class logits and activations."""
        return self._reader.rows(images)

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> TorchScore:  # noqa: ARG002
        """The odds against the first class: as a score they order images like the largest probability does."""
        return TorchScore(lambda rows: _odds_against(self._reader.logits(rows)), self._reader.trace)


def _odds_against(logits: Tensor) -> Tensor:
    ordered = logits.double().sort(dim=1).values
    # log((1 - p) / p) = log of the sum of e^(other - first): exact also where p rounds to 1
    return (ordered[:, :-1] - ordered[:, -1:]).logsumexp(dim=1)
