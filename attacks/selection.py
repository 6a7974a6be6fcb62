"""Which images are worth attacking: those that the network gets right."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from detector.batches import device_of, to_tensor
from detector.datasets import ImageSet, Indices
from detector.workers import IN_PROCESS, Workers


def rightly_classified(
    network: nn.Module, images: ImageSet, batch: int = 500, workers: Workers = IN_PROCESS
) -> Indices:
    """Positions of the images in `images` whose label `network` gets right, in order."""
    starts = list(range(0, len(images), batch))
    right = list(workers.map(_Classifying(network, images, batch), starts))
    return np.concatenate(right) if right else np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class _Classifying:
    """What every worker holds; called, it gives what classifies the batch from a position on."""

    network: nn.Module
    images: ImageSet
    batch: int

    def __call__(self) -> Callable[[int], Indices]:
        self.network.eval()

        def right_from(start: int) -> Indices:
            positions = slice(start, min(start + self.batch, len(self.images)))
            pixels = to_tensor(self.images.pixels(positions), device_of(self.network))
            with torch.inference_mode():
                predicted = self.network(pixels).argmax(dim=1).cpu().numpy()
            return np.flatnonzero(predicted == self.images.labels[positions]) + start

        return right_from
