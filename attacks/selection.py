"""Which images are worth attacking: those that the network gets right."""

import numpy as np
import torch
from torch import nn

from detector.batches import batches, device_of
from detector.datasets import ImageSet, Indices


def rightly_classified(network: nn.Module, images: ImageSet, batch: int = 500) -> Indices:
    """Positions of the images in `images` whose label `network` gets right, in order."""
    network.eval()
    right = []
    with torch.inference_mode():
        for positions, pixels in batches(images, batch, device_of(network)):
            predicted = network(pixels).argmax(dim=1).cpu().numpy()
            right.append(np.flatnonzero(predicted == images.labels[positions]) + positions.start)
    return np.concatenate(right) if right else np.empty(0, np.int64)
