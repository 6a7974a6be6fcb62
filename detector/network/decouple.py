"""Put gates into a CNN: a plain backbone becomes a decoupled network.

Which convolutions are gated is read off the network's torch.fx graph: each ungrouped convolution that is followed by a
batch normalisation, but for the stem (the first convolution). The gate acts behind the normalisation and, where one
follows directly, behind the activation: a closed filter is then exactly zero, and because the mask is 0 or 1 and the
activation of 0 is 0, acting before or after it is the same. Grouped and depthwise convolutions stay ungated: each of
their filters reads few channels, which the gate of the convolution before them already closes. So do convolutions that
are called twice: one bit cannot say what a filter did in both.

A network that torch.fx cannot trace (its steps depend on the image, say) has its convolutions named by patterns; the
normalisation behind each is then found by running an example (see `detector.network.named_gates`).
"""

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from detector.errors import RequestError
from detector.network.gates import ChannelGate, GateReading
from detector.network.named_gates import NamedGates, normalised_convolutions

_ACTIVATIONS_WITH_ZERO_AT_ZERO = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.ELU, nn.Tanh)
_FUNCTIONS_WITH_ZERO_AT_ZERO = (F.relu, torch.relu, F.relu6, F.leaky_relu, F.silu, F.gelu, F.hardswish, torch.tanh)
_ACTIVATIONS_WITHOUT_ZERO_AT_ZERO = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid, nn.Softmax, nn.Softmax2d)
_FUNCTIONS_WITHOUT_ZERO_AT_ZERO = (torch.sigmoid, F.sigmoid, F.hardsigmoid, F.softplus, F.logsigmoid, F.softmax)


class GatedNet(nn.Module):
    """A decoupled network: calling it gives logits, `trace` gives logits and what every gate said.

    In evaluation mode masks are deterministic and each image is gated alone. Where gradients are wanted, they pass
    the gates straight through, so that an attacker sees them; `frozen_gates` turns that off.
    """

    def __init__(self, graph: fx.GraphModule | NamedGates, layers: Mapping[str, int]) -> None:
        """Made by `decouple`.

        Args:
            graph: images -> (logits, readings of all gates in network order).
            layers: gate name -> filters, in network order.
        """
        super().__init__()
        self.graph = graph
        self.layers = dict(layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], `(batch, channels, height, width)` -> logits `(batch, classes)`."""
        logits: Tensor = self.graph(images)[0]
        return logits

    def trace(self, images: Tensor) -> tuple[Tensor, dict[str, GateReading]]:
        """Images in [0, 1], `(batch, channels, height, width)` -> logits and the reading of each gate by name."""
        logits, readings = self.graph(images)
        return logits, dict(zip(self.layers, readings, strict=True))

    @property
    def reads(self) -> dict[str, int]:
        """Gate name -> channels that the gate reads, in network order."""
        return {name: gate.squeeze.in_features for name, gate in zip(self.layers, self.gates(), strict=True)}

    def gates(self) -> list[ChannelGate]:
        """The gates, in network order."""
        gates = self.graph.get_submodule("gates")
        return [gate for gate in gates.children() if isinstance(gate, ChannelGate)]

    def set_noise(self, noise: float) -> None:
        """Standard deviation of the training noise on every gate's logits, 0 for none."""
        for gate in self.gates():
            gate.noise = noise

    def hold_gates(self, held: bool) -> None:
        """Whether training leaves the gates' own weights as they are; gradients pass through the gates all the same."""
        for gate in self.gates():
            gate.requires_grad_(not held)

    @contextmanager
    def frozen_gates(self) -> Iterator[None]:
        """Within it, no gradient reaches the gates: the network as an attacker sees it who overlooks them."""
        before = [gate.frozen for gate in self.gates()]
        for gate in self.gates():
            gate.frozen = True
        try:
            yield
        finally:
            for gate, was in zip(self.gates(), before, strict=True):
                gate.frozen = was


def decouple(
    backbone: nn.Module,
    keep: float = 0.7,
    normalised: bool = True,
    patterns: Sequence[str] = (),
    example: Tensor | None = None,
) -> GatedNet:
    """A decoupled copy of `backbone`, in evaluation mode; the backbone itself is left as it is.

    What the backbone does in training only (auxiliary heads, dropout that is called as a function) is left out.

    Args:
        backbone: a CNN in torch.
        keep: share of filters open at the start, in (0, 1].
        normalised: whether gate logits are batch-normalised (see `ChannelGate`).
        patterns: gate only convolutions whose names fit one of these, with `*` and `?`; none for all.
        example: images that the network takes, `(batch, channels, height, width)`; needed, with `patterns`, for a
            network that torch.fx cannot trace.

    Raises:
        RequestError: `keep` is out of range, the network has nothing to gate, or it cannot be traced and its
            convolutions are not named.
    """
    if not 0 < keep <= 1:
        raise RequestError(f"expected a share of filters to keep in (0, 1], got {keep}")
    # What torch.fx traces it fixes, and with it what depends on the mode: the network as it is used is what is traced.
    name, copied = type(backbone).__name__, copy.deepcopy(backbone).eval()
    if hasattr(copied, "gates"):
        raise RequestError(f"expected a network without gates, got {name} with a part called gates")
    try:
        graph = _traced(copied)
    except Exception as error:  # whatever the network's own code does with a tensor that has no values
        if patterns and example is not None:
            return decouple_named(copied, keep, normalised, _named_pairs(copied, patterns, example))
        reason = " ".join(str(error).split())[:200]
        raise RequestError(
            f"expected a network that torch.fx can trace, or names of its convolutions (--gate 'block*.conv*'); got "
            f"{name}: {reason}"
        ) from None
    places = [place for place in _gated_places(graph) if _is_wanted(str(place[0].target), patterns)]
    if not places:
        raise RequestError(
            f"expected an ungrouped convolution with batch normalisation beyond the stem"
            f"{', named like ' + ', '.join(patterns) if patterns else ''}; got none in {name}"
        )
    gates = nn.ModuleList()
    graph.add_module("gates", gates)
    layers: dict[str, int] = {}
    readings: list[fx.Node] = []
    for index, (convolution, output) in enumerate(places):
        module = graph.get_submodule(str(convolution.target))
        assert isinstance(module, nn.Conv2d)
        gates.append(ChannelGate(module.in_channels, module.out_channels, keep, normalised))
        layers[str(convolution.target)] = module.out_channels
        with graph.graph.inserting_after(output):
            both = graph.graph.call_module(f"gates.{index}", (convolution.args[0], output))
        with graph.graph.inserting_after(both):
            reading = graph.graph.call_function(reading_of, (both,))
            gated = graph.graph.call_function(output_of, (both,))
        output.replace_all_uses_with(gated)
        both.args = (convolution.args[0], output)  # the gate itself still reads what it gates
        readings.append(reading)
    end = next(node for node in graph.graph.nodes if node.op == "output")
    end.args = ((end.args[0], tuple(readings)),)
    graph.graph.lint()
    graph.recompile()
    return GatedNet(graph, layers).eval()


def decouple_named(backbone: nn.Module, keep: float, normalised: bool, pairs: Mapping[str, str]) -> GatedNet:
    """A decoupled copy of a network that torch.fx cannot trace.

    Args:
        backbone: a CNN in torch.
        keep: share of filters open at the start, in (0, 1].
        normalised: whether gate logits are batch-normalised (see `ChannelGate`).
        pairs: name of each gated convolution -> name of the normalisation behind it.

    Raises:
        RequestError: the network has no convolution of such a name.
    """
    copied = copy.deepcopy(backbone).eval()
    modules = dict(copied.named_modules())
    gates = nn.ModuleList()
    layers: dict[str, int] = {}
    for name, norm in pairs.items():
        module = modules.get(name)
        if not isinstance(module, nn.Conv2d) or norm not in modules:
            raise RequestError(f"expected a convolution {name} and a normalisation {norm}, got none in the network")
        gates.append(ChannelGate(module.in_channels, module.out_channels, keep, normalised))
        layers[name] = module.out_channels
    return GatedNet(NamedGates(copied, pairs, gates), layers).eval()


def _named_pairs(network: nn.Module, patterns: Sequence[str], example: Tensor) -> dict[str, str]:
    found = normalised_convolutions(network, example)
    pairs = {convolution: norm for convolution, norm in found.items() if _is_wanted(convolution, patterns)}
    if not pairs:
        raise RequestError(
            f"expected ungrouped convolutions with batch normalisation beyond the stem, called once and named like "
            f"{', '.join(patterns)}; got none in {type(network).__name__}"
        )
    return pairs


def _is_wanted(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch(name, pattern) for pattern in patterns)


# Two tracers at once would take each other's hooks away.
_TRACING = threading.Lock()


class _OwnThreadTracer(fx.Tracer):
    """A tracer that lets the modules of other threads be.

    While it traces, torch.fx has its hooks in every module of the process: without this, a network that is loaded
    would break the one that is serving in another thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _traced(network: nn.Module) -> fx.GraphModule:
    """As `fx.symbolic_trace`, beside other threads that run networks."""
    with _TRACING:
        tracer = _OwnThreadTracer()
        graph = tracer.trace(network)
    return fx.GraphModule(tracer.root, graph, type(network).__name__)


def _gated_places(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs of a convolution and the node behind which its gate acts."""
    modules: dict[str, nn.Module] = dict(graph.named_modules())
    convolutions = [n for n in graph.graph.nodes if isinstance(_module_of(n, modules), nn.Conv2d)]
    calls = Counter(node.target for node in convolutions)
    for node in convolutions[1:]:
        module = _module_of(node, modules)
        assert isinstance(module, nn.Conv2d)
        followers = list(node.users)
        if module.groups != 1 or calls[node.target] != 1 or len(followers) != 1:
            continue
        output = followers[0]
        if not isinstance(_module_of(output, modules), nn.BatchNorm2d):
            continue
        users = list(output.users)
        if any(_opens_what_is_closed(user, modules) for user in users):
            continue
        if len(users) == 1 and _is_activation(users[0], modules):
            output = users[0]
        yield node, output


def _module_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _is_activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_function":
        return node.target in _FUNCTIONS_WITH_ZERO_AT_ZERO
    return isinstance(_module_of(node, modules), _ACTIVATIONS_WITH_ZERO_AT_ZERO)


def _opens_what_is_closed(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether this is an activation that makes something else of zero, so that no gate before it closes anything."""
    if node.op == "call_function":
        return node.target in _FUNCTIONS_WITHOUT_ZERO_AT_ZERO
    return isinstance(_module_of(node, modules), _ACTIVATIONS_WITHOUT_ZERO_AT_ZERO)


def output_of(pair: tuple[Any, Any]) -> Any:
    """What a gate lets through, of the pair that it returns; a function, so that torch.fx has a node for it."""
    return pair[0]


def reading_of(pair: tuple[Any, Any]) -> Any:
    """What the gate said, likewise."""
    return pair[1]
