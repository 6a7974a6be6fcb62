"""Multiply-accumulates of a decoupled network, counted for each image's own path.

A closed filter of a convolution need not be computed, and neither need what the next convolution would read of it. A
convolution reads a reduced input only straight behind gates (or a pooling, an activation or a concatenation behind
them): where a shortcut is added, every channel may be non-zero. In a network that torch.fx cannot trace nothing is
known of what a convolution reads: there only closed filters are saved.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from detector.network.decouple import GatedNet
from detector.paths.path_encoding import PathEncoding

_KEEPS_CLOSED_CHANNELS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.ReLU6, nn.Dropout, nn.Identity)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One convolution or linear map.

    Attributes:
        per_pair: multiply-accumulates for each pair of an input and an output channel (of one group).
        in_channels: input channels that each output channel reads.
        out_channels: output channels.
        read_gates: the gates whose closed channels need not be read.
        own_gate: the gate whose closed filters need not be computed; None where all are.
    """

    per_pair: int
    in_channels: int
    out_channels: int
    read_gates: tuple[str, ...]
    own_gate: str | None


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """A decoupled network at one image size.

    Attributes:
        layers: its convolutions and linear maps, gates left out, in network order.
        gates: multiply-accumulates of all gates together.
    """

    layers: tuple[LayerCost, ...]
    gates: int

    @property
    def dense(self) -> int:
        """Multiply-accumulates of the plain backbone."""
        return sum(layer.per_pair * layer.in_channels * layer.out_channels for layer in self.layers)

    def of(self, paths: PathEncoding) -> npt.NDArray[np.int64]:
        """Multiply-accumulates of each image, gates included, `(images,)`."""
        opened = {name: bits.sum(axis=1, dtype=np.int64) for name, bits in paths.by_layer().items()}
        closed = {name: paths.layers[name] - count for name, count in opened.items()}
        total = np.full(len(paths), self.gates, np.int64)
        for layer in self.layers:
            read = layer.in_channels - sum((closed[gate] for gate in layer.read_gates), np.zeros(len(paths), np.int64))
            made = opened[layer.own_gate] if layer.own_gate else layer.out_channels
            total += layer.per_pair * read * made
        return total


def cost_of(network: GatedNet, example: Tensor) -> NetworkCost:
    """Count `network` for images of the size of `example`, `(1, channels, height, width)`."""
    areas: dict[nn.Module, int] = {}

    def note(module: nn.Module, _inputs: object, output: Tensor) -> None:
        # For each call; a linear map may be called on many places of one image.
        places = output[0].numel() // (module.out_features if isinstance(module, nn.Linear) else output.shape[1])
        areas[module] = areas.get(module, 0) + places

    modules = dict(network.graph.named_modules())
    counted = {name: module for name, module in modules.items() if _is_counted(name, module)}
    hooks = [module.register_forward_hook(note) for module in counted.values()]
    try:
        with torch.inference_mode():
            network(example)
    finally:
        for hook in hooks:
            hook.remove()
    layers = tuple(_layer_costs(network, counted, areas))
    gates = sum(gate.squeeze.weight.numel() + gate.excite.weight.numel() for gate in network.gates())
    return NetworkCost(layers, gates)


def _is_counted(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear) and not name.startswith("gates.")


def _layer_costs(
    network: GatedNet, counted: dict[str, nn.Module], areas: Mapping[nn.Module, int]
) -> Iterator[LayerCost]:
    if not isinstance(network.graph, fx.GraphModule):
        yield from _costs_by_name(network, counted, areas)
        return
    names = {f"gates.{index}": name for index, name in enumerate(network.layers)}
    modules = dict(network.graph.named_modules())
    for node in network.graph.graph.nodes:
        module = counted.pop(str(node.target), None) if node.op == "call_module" else None
        if module not in areas:
            continue
        if isinstance(module, nn.Conv2d):
            own = str(node.target) if str(node.target) in network.layers else None
            read = tuple(_gates_behind(node.args[0], modules, names)) if module.groups == 1 else ()
            per_pair = areas[module] * module.kernel_size[0] * module.kernel_size[1]
            yield LayerCost(per_pair, module.in_channels // module.groups, module.out_channels, read, own)
        elif isinstance(module, nn.Linear):
            yield LayerCost(areas[module], module.in_features, module.out_features, (), None)


def _costs_by_name(
    network: GatedNet, counted: Mapping[str, nn.Module], areas: Mapping[nn.Module, int]
) -> Iterator[LayerCost]:
    for name, module in counted.items():
        if module not in areas:
            continue
        if isinstance(module, nn.Conv2d):
            per_pair = areas[module] * module.kernel_size[0] * module.kernel_size[1]
            own = name.removeprefix("backbone.")
            gate = own if own in network.layers else None
            yield LayerCost(per_pair, module.in_channels // module.groups, module.out_channels, (), gate)
        elif isinstance(module, nn.Linear):
            yield LayerCost(areas[module], module.in_features, module.out_features, (), None)


def _gates_behind(node: fx.Node, modules: Mapping[str, nn.Module], names: Mapping[str, str]) -> Iterator[str]:
    """The gates that `node` is the output of, seen through what keeps closed channels closed."""
    while node.op == "call_module" and isinstance(modules.get(str(node.target)), _KEEPS_CLOSED_CHANNELS):
        before = node.args[0]
        assert isinstance(before, fx.Node)
        node = before
    if node.op != "call_function" or not node.args:
        return
    source = node.args[0]
    if node.target is torch.cat and isinstance(source, list | tuple):
        if (node.args[1:] or (node.kwargs.get("dim", 0),))[0] not in (1, -3):
            return
        for part in source:
            if isinstance(part, fx.Node):
                yield from _gates_behind(part, modules, names)
    # A gated output is the first of the pair that the gate returns.
    elif isinstance(source, fx.Node) and str(source.target) in names:
        yield names[str(source.target)]
