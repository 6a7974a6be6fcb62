"""The engine that every other one is held against: the whole network, masked, in torch eager."""

import torch

from detector.batches import to_tensor
from detector.engines.engine import Answers
from detector.images import Pixels
from detector.network.decouple import GatedNet
from detector.network.folding import fold_normalisation
from detector.paths.encoder import encode


class MaskedEngine:
    """Every filter is computed, closed ones are set to zero; on any device, for any network.

    Attributes:
        network: that it runs, folded: to be read only.
    """

    name = "masked"

    def __init__(self, network: GatedNet, device: torch.device) -> None:
        """Fold `network`, which must be in evaluation mode, and put it on `device`."""
        self.network = fold_normalisation(network).to(device)
        self._device = device

    def answer(self, pixels: Pixels) -> Answers:
        """As `Engine.answer`."""
        return Answers(encode(self.network, to_tensor(pixels, self._device)))
