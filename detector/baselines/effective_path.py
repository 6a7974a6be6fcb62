"""The channels that carry the predicted class (Qiu et al., "Adversarial Defense Through Network Profiling Based Path
Extraction", CVPR 2019).

Theirs are neurons and synapses, traced back from the predicted class; here a path is made of channels, whose
contribution to the predicted class's logit is gradient times activation (for the last layer the very product that they
sum, for earlier ones its linear part). In each layer the path is the smallest set of channels that carry the share
θ = 0.5 of all positive contributions, as theirs. It is compared with the class's own path: the channels that are on the
path of a tenth of its clean images or more, where they take all that are ever on one, which for channels soon are all
there are. A logistic regression reads each layer's likeness.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from detector.baselines.baseline import Observed, fitted_on
from detector.network.decouple import GatedNet
from detector.network.gates import GateReading
from detector.paths.encoder import Floats
from detector.scoring.compiled_score import Score

SHARE, COMMON = 0.5, 0.1


class EffectivePaths:
    """A logistic regression on how much of each layer's effective path lies on the path of the predicted class."""

    name, sees, images = "effective path", "effective paths", 500

    def __init__(self, network: GatedNet, classes: int) -> None:
        self._network = network
        self._classes = classes

    def observe(self, images: Tensor) -> Floats:
        """The predicted class, then 1 for each channel on the effective path."""
        label, contributions = _contributions(self._network, images)
        parts = [label[:, None].float(), *(smallest_set(part, SHARE).float() for part in contributions)]
        return torch.cat(parts, dim=1).cpu().numpy()

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> Score:
        """Learn the paths of the classes from clean images, then weigh the layers."""
        labels, paths = clean.rows[:, 0].astype(int), clean.rows[:, 1:]
        usual = np.stack([
            paths[labels == label].mean(axis=0) >= COMMON if (labels == label).any() else np.zeros(paths.shape[1])
            for label in range(self._classes)
        ])  # fmt: skip
        ends = np.cumsum(list(self._network.layers.values()))[:-1]

        def likeness(rows: Floats) -> Floats:
            own, of_class = rows[:, 1:], usual[rows[:, 0].astype(int)]
            both = np.split(own * of_class, ends, axis=1)
            return np.stack([
                shared.sum(axis=1) / np.maximum(part.sum(axis=1), 1)
                for shared, part in zip(both, np.split(own, ends, axis=1), strict=True)
            ], axis=1)  # fmt: skip

        return fitted_on(likeness, clean, attacked)


def smallest_set(contributions: Tensor, share: float) -> Tensor:
    """The largest contributions of each image that together reach `share` of its positive ones, `(images, channels)`.

    Args:
        contributions: `(images, channels)`.
        share: in (0, 1].
    """
    positive = contributions.clamp_min(0)
    ordered, order = positive.sort(dim=1, descending=True)
    before = ordered.cumsum(dim=1) - ordered
    wanted = (before < share * positive.sum(dim=1, keepdim=True)) & (ordered > 0)
    return torch.zeros_like(wanted).scatter(1, order, wanted)


def _contributions(network: GatedNet, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    seen: list[Tensor] = []
    with torch.enable_grad(), _watched(network, seen):
        logits: Tensor = network(images.detach().requires_grad_())
        label = logits.argmax(dim=1)
        gradients = torch.autograd.grad(logits.gather(1, label[:, None]).sum(), seen, allow_unused=True)
    found = [
        (value.detach() * (torch.zeros_like(value) if slope is None else slope)).sum(dim=(2, 3))
        for value, slope in zip(seen, gradients, strict=True)
    ]
    return label, found


@contextmanager
def _watched(network: GatedNet, seen: list[Tensor]) -> Iterator[None]:
    def note(_module: nn.Module, _args: object, out: tuple[Tensor, GateReading]) -> None:
        seen.append(out[0])

    handles = [gate.register_forward_hook(note) for gate in network.gates()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
