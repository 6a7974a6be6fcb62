"""Gates in a network that torch.fx cannot trace: they act on its named modules while it runs.

The gate of a convolution reads the convolution's input and acts on the output of the normalisation behind it, through
hooks that live for one forward pass only. One thread at a time may run such a network.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from detector.errors import RequestError
from detector.network.gates import GateReading


class NamedGates(nn.Module):
    """Runs a network with gates on some of its modules: images -> (logits, readings in the order of `pairs`)."""

    def __init__(self, backbone: nn.Module, pairs: Mapping[str, str], gates: nn.ModuleList) -> None:
        """Gates for `backbone`.

        Args:
            backbone: the network; each convolution of `pairs` must be called exactly once.
            pairs: name of a convolution -> name of the normalisation behind it.
            gates: a `ChannelGate` for each pair, in the same order.
        """
        super().__init__()
        self.backbone = backbone
        self.pairs = dict(pairs)
        self.gates = gates

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[GateReading, ...]]:
        """Images in [0, 1], `(batch, channels, height, width)` -> logits and the reading of each gate.

        Raises:
            RequestError: a gated convolution did not run exactly once.
        """
        inputs: dict[int, Tensor] = {}
        readings: dict[int, GateReading] = {}
        handles = []
        for index, (convolution, norm) in enumerate(self.pairs.items()):

            def note(_module: nn.Module, args: tuple[Tensor, ...], index: int = index) -> None:
                if index in readings:
                    raise RequestError(self._told(index, "more than once"))
                inputs[index] = args[0]

            def close(_module: nn.Module, _args: object, output: Tensor, index: int = index) -> Tensor:
                if index not in inputs:
                    raise RequestError(self._told(index, "another number of times"))
                gated, readings[index] = self.gates[index](inputs.pop(index), output)
                masked: Tensor = gated
                return masked

            handles.append(self.backbone.get_submodule(convolution).register_forward_pre_hook(note))
            handles.append(self.backbone.get_submodule(norm).register_forward_hook(close))
        try:
            logits = self.backbone(images)
        finally:
            for handle in handles:
                handle.remove()
        missing = [index for index in range(len(self.pairs)) if index not in readings]
        if missing:
            raise RequestError(self._told(missing[0], "not at all"))
        return logits, tuple(readings[index] for index in range(len(self.pairs)))

    def _told(self, index: int, found: str) -> str:
        return (
            f"expected the gated convolution {list(self.pairs)[index]} to run once for every image, got a batch for "
            f"which it ran {found}; gate only convolutions that always run"
        )


def normalised_convolutions(network: nn.Module, example: Tensor) -> dict[str, str]:
    """The ungrouped convolutions beyond the stem whose output goes straight into a batch normalisation.

    Args:
        network: is run once, in evaluation mode, and left in the mode it was in.
        example: images that it takes, `(batch, channels, height, width)`.

    Returns:
        Name of a convolution -> name of the normalisation, in the order of the calls; those called more than once are
        left out.
    """
    names = {module: name for name, module in network.named_modules()}
    calls: Counter[nn.Module] = Counter()
    order: list[nn.Conv2d] = []
    outputs: dict[nn.Module, Tensor] = {}
    found: dict[nn.Module, nn.Module] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            order.append(module)
            outputs[module] = output
        else:
            found.update({convolution: module for convolution, made in outputs.items() if made is args[0]})

    modes = [(module, module.training) for module in network.modules()]
    watched = [module for module in names if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    handles = [module.register_forward_hook(note) for module in watched]
    try:
        network.eval()
        with torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return {
        names[convolution]: names[found[convolution]]
        for convolution in order[1:]
        if convolution in found
        and convolution.groups == 1
        and calls[convolution] == 1
        and calls[found[convolution]] == 1
    }
