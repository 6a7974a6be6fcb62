"""What a network can no longer do without a combination of filters: the check that the combination causes something."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from detector.batches import batches, device_of
from detector.datasets import ImageSet
from detector.interpretation.concepts import Combination
from detector.interpretation.forced_path import forced_path
from detector.network.decouple import GatedNet


@dataclass(frozen=True, slots=True)
class Closing:
    """What closing a combination costs.

    Attributes:
        combination: which filters are closed for every image.
        own: by how much the accuracy of its class falls, in [-1, 1]; NaN without images of it.
        others: by how much that of the other classes falls, the mean of those with images, in [-1, 1]; NaN without any.
    """

    combination: Combination
    own: float
    others: float

    @property
    def ratio(self) -> float:
        """How many times as much its own class loses; infinite where the others lose nothing, NaN where one is."""
        if math.isnan(self.own) or math.isnan(self.others):
            return math.nan
        return self.own / self.others if self.others > 0 else float("inf")


def close_combinations(
    network: GatedNet, images: ImageSet, combinations: Sequence[Combination], batch: int = 250
) -> list[Closing]:
    """Each combination closed in turn; `images` pass the network once for each, and once with none closed."""
    open_ = class_accuracies(network, images, None, batch)
    rows = []
    for combination in combinations:
        fell = open_ - class_accuracies(network, images, combination.filters, batch)
        others = np.delete(fell, combination.label)
        others = others[~np.isnan(others)]
        mean = float(others.mean()) if len(others) else math.nan
        rows.append(Closing(combination, float(fell[combination.label]), mean))
    return rows


def class_accuracies(
    network: GatedNet, images: ImageSet, closed: Sequence[int] | None, batch: int = 250
) -> npt.NDArray[np.float64]:
    """Share of each class's images whose label is right, with filters closed, `(classes,)`; NaN for a class of none."""
    states = torch.full((1, sum(network.layers.values())), torch.nan, device=device_of(network))
    states[0, list(closed or ())] = 0.0
    right = np.zeros(len(images.class_names))
    with torch.inference_mode(), forced_path(network, states):
        for place, pixels in batches(images, batch, device_of(network)):
            labels = images.labels[place]
            hits = network(pixels).argmax(dim=1).cpu().numpy() == labels
            right += np.bincount(labels[hits], minlength=len(right))
    counts = np.bincount(images.labels, minlength=len(right))
    return np.asarray(np.divide(right, counts, out=np.full(len(right), np.nan), where=counts > 0))
