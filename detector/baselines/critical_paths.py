"""Gates found for each image by gradient descent (Wang et al., "Interpret Neural Networks by Identifying Critical Data
Routing Paths", CVPR 2018).

Their distillation: a control gate multiplies each channel, starts at 1, and is moved so that the network's answer stays
while few gates stay open; the gates of the step with the least loss that keeps the label are the routing path. 30 steps
of gradient descent at 0.1 with momentum 0.9, weight of the gates' sum 0.05, gates kept in [0, 10], as in the paper; a
random forest reads them, as there. It costs 30 forward and backward passes an image.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.baselines.baseline import Observed, fitted_on
from detector.network.decouple import GatedNet
from detector.network.gates import GateReading
from detector.paths.encoder import Floats
from detector.scoring.compiled_score import Score

STEPS, RATE, MOMENTUM, SPARSITY, LARGEST = 30, 0.1, 0.9, 0.05, 10.0


class CriticalPaths:
    """A random forest on control gates that were optimised for each image."""

    name, sees, images = "CDRP", "control gates", 100

    def __init__(self, network: GatedNet, seed: int = 0) -> None:
        self._network = network
        self._seed = seed

    def observe(self, images: Tensor) -> Floats:
        """The control gates of all layers, side by side."""
        return control_gates(self._network, images).float().cpu().numpy()

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> Score:
        """Fit the forest."""
        return fitted_on(lambda rows: rows, clean, attacked, "random-forest", self._seed)


def control_gates(network: GatedNet, images: Tensor) -> Tensor:
    """The control gates of `images`, `(batch, total channels)`.

    Args:
        network: in evaluation mode.
        images: in [0, 1], `(batch, channels, height, width)`.
    """
    with torch.no_grad():
        answer = network(images).softmax(dim=1)
    label = answer.argmax(dim=1)
    widths = list(network.layers.values())
    gates = torch.ones(len(images), sum(widths), device=images.device, requires_grad=True)
    best, least = gates.detach().clone(), torch.full((len(images),), torch.inf, device=images.device)
    optimizer = torch.optim.SGD([gates], lr=RATE, momentum=MOMENTUM)
    wanting = [weights for weights in network.parameters() if weights.requires_grad]
    for weights in wanting:
        weights.requires_grad_(False)
    try:
        with torch.enable_grad():
            for _ in range(STEPS):
                with _controlled(network, gates.split(widths, dim=1)):
                    logits = network(images)
                kept = -(answer * F.log_softmax(logits, dim=1)).sum(dim=1)
                losses = kept + SPARSITY * gates.abs().sum(dim=1)
                with torch.no_grad():
                    better = (losses < least) & (logits.argmax(dim=1) == label)
                    best[better], least[better] = gates[better], losses[better]
                optimizer.zero_grad(set_to_none=True)
                losses.sum().backward()  # each image's gates see their own loss alone
                optimizer.step()
                with torch.no_grad():
                    gates.clamp_(0, LARGEST)
    finally:
        for weights in wanting:
            weights.requires_grad_(True)
    return best


@contextmanager
def _controlled(network: GatedNet, gates: tuple[Tensor, ...]) -> Iterator[None]:
    """Within it, what leaves each gate of the network is multiplied by a control gate as well."""

    def control(module: nn.Module, by: Tensor) -> torch.utils.hooks.RemovableHandle:
        def multiply(_module: nn.Module, _args: object, out: tuple[Tensor, GateReading]) -> tuple[Tensor, GateReading]:
            return out[0] * by[:, :, None, None], out[1]

        return module.register_forward_hook(multiply)

    handles = [control(gate, by) for gate, by in zip(network.gates(), gates, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
