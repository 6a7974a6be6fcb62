"""A decoupled network as a list of steps for the compiled kernel (kernel.c), read off its torch.fx graph.

Normalisations are folded first. What follows a convolution directly (activation, gate, sum with a shortcut) becomes
part of its step. A network with anything that the kernel does not know is refused, and served by another engine.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from detector.batches import device_of
from detector.errors import EngineError
from detector.images import ImageSpec
from detector.network.decouple import GatedNet, output_of
from detector.network.folding import fold_normalisation
from detector.network.gates import ChannelGate

Array = npt.NDArray[np.float32]

# As in kernel.c.
(PIXELS, CONVOLVE, GATE, ADD, RELU, AFFINE, MAX_POOL, MEAN_POOL, MEAN, LINEAR, SUBSAMPLE, PAD_CHANNELS, CONCATENATE) = (
    range(13)
)
MAX_TAPS = 128
# Floats that a convolution lays its input out in at a time: half of a usual second-level cache.
SCRATCH = 128 * 1024
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """The shape of a step's output: channels, height, width; 1 x 1 for what a linear map gives."""

    channels: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Of one channel."""
        return self.height * self.width


@dataclass(frozen=True, slots=True)
class Step:
    """One step, with its numbers and arrays as `struct step` names them.

    Attributes:
        kind: what it does.
        out: the map it writes; -1 for a gate, which writes bits.
        input: the map it reads.
        other: another one; -1 for none.
        numbers: by field.
        arrays: by field; `float32`, but `kept`, `int32`: of a compacted convolution, its filters' places in the layer;
            of a gate that reads a compacted map, its channels' places in the whole one.
    """

    kind: int
    out: int
    input: int = -1
    other: int = -1
    numbers: Mapping[str, int] = field(default_factory=dict)
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Program:
    """What the kernel does for one image.

    Attributes:
        maps: all feature maps; the first is the image.
        steps: in order.
        result: the map of the class logits.
        layers: gate name -> its filters, in network order; all of them are bits of a path.
        reads: gate name -> channels that it reads in the whole network, likewise.
    """

    maps: tuple[FeatureMap, ...]
    steps: tuple[Step, ...]
    result: int
    layers: Mapping[str, int]
    reads: Mapping[str, int]

    @property
    def filters(self) -> int:
        """Bits of a path."""
        return sum(self.layers.values())

    @property
    def channels_read(self) -> int:
        """Of all gates together, in the whole network."""
        return sum(self.reads.values())

    @property
    def classes(self) -> int:
        """How many class logits there are."""
        return self.maps[self.result].channels


def program_of(network: GatedNet, spec: ImageSpec) -> Program:
    """The program of `network`, which must be in evaluation mode, for images of `spec`.

    Raises:
        EngineError: torch.fx cannot trace the network, or it has a part that the kernel does not know.
    """
    graph = fold_normalisation(network, share=device_of(network).type == "cpu").cpu().graph
    if not isinstance(graph, fx.GraphModule):
        raise EngineError("expected a network that torch.fx can trace, got one with gates put in by name")
    try:
        with torch.inference_mode():
            ShapeProp(graph).propagate(torch.zeros(1, spec.channels, spec.height, spec.width))
        return _Lowering(graph, network.layers, network.reads).run(spec)
    except EngineError:
        raise
    except Exception as error:  # a user's own network may do anything; the masked engine runs it as it is
        reason = " ".join(str(error).split())[:200]
        raise EngineError(f"expected a network that the kernel knows, got one on which it fails: {reason}") from error


class _Lowering:
    """One walk over the graph."""

    def __init__(self, graph: fx.GraphModule, layers: Mapping[str, int], reads: Mapping[str, int]) -> None:
        self._graph = graph
        self._modules = dict(graph.named_modules())
        self._maps: list[FeatureMap] = []
        self._steps: list[Step] = []
        self._of: dict[fx.Node, int] = {}  # node -> the map of its value
        self._layers, self._reads = dict(layers), dict(reads)
        self._first_bit = [0, *np.cumsum(list(layers.values())).tolist()]
        self._first_read = [0, *np.cumsum(list(reads.values())).tolist()]

    def run(self, spec: ImageSpec) -> Program:
        nodes = list(self._graph.graph.nodes)
        for node in nodes:
            _put_in_place(node)
        result = -1
        for node in nodes:
            if node.op == "placeholder":
                self._of[node] = self._new(FeatureMap(spec.channels, spec.height, spec.width))
                self._steps.append(Step(PIXELS, self._of[node]))
            elif node.op == "output":
                result = self._of[node.args[0][0]]
            # What gives no tensor, such as `x.size(0)`, is an operand of others, which look at the shapes they make.
            elif (
                node not in self._of
                and not self._is_gate_or_part(node)
                and node.op != "get_attr"
                and "tensor_meta" in node.meta
            ):
                self._lower(node)
        return Program(tuple(self._maps), tuple(self._steps), result, self._layers, self._reads)

    def _is_gate_or_part(self, node: fx.Node) -> bool:
        """Whether it is a gate, or takes one of the two values of one; those come with their convolution."""
        source = node.args[0] if node.args else None
        return self._is_gate(node) or (
            node.op == "call_function" and isinstance(source, fx.Node) and self._is_gate(source)
        )

    def _is_gate(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._modules.get(str(node.target)), ChannelGate)

    def _lower(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            lower: Callable[..., None] | None = _MODULES.get(type(module))
            if lower is None:
                raise EngineError(f"expected layers that the kernel knows, got {type(module).__name__}")
            lower(self, node, module)
            return
        lower = _FUNCTIONS.get(node.target)
        if lower is None:
            raise EngineError(f"expected operations that the kernel knows, got {node.target}")
        lower(self, node)

    def _new(self, shape: FeatureMap) -> int:
        self._maps.append(shape)
        return len(self._maps) - 1

    def _input(self, value: object) -> int:
        if not isinstance(value, fx.Node) or value not in self._of:
            raise EngineError(f"expected feature maps as operands, got {value}")
        return self._of[value]

    def _add_step(
        self,
        kind: int,
        node: fx.Node,
        source: object,
        other: int = -1,
        arrays: Mapping[str, Array] | None = None,
        **numbers: int,
    ) -> Step:
        shape, read = shape_of(node), self._maps[self._input(source)]
        if kind in _BY_NUMBER:  # what was flattened lies as it did before
            if read.channels * read.pixels != shape.channels * shape.pixels:
                raise EngineError(f"expected arithmetic that keeps the shape, got {read} to {shape}")
            shape = read
        step = Step(kind, self._new(shape), self._input(source), other, numbers, arrays or {})
        self._steps.append(step)
        self._of[node] = step.out
        return step

    def alias(self, node: fx.Node, *_: object) -> None:
        self._of[node] = self._input(node.args[0])

    def convolution(self, node: fx.Node, module: nn.Conv2d) -> None:
        stride, padding, kernel = _same(module.stride), module.padding, module.kernel_size
        if (
            module.groups != 1
            or set(module.dilation) != {1}
            or isinstance(padding, str)
            or module.padding_mode != "zeros"
            or kernel[0] * kernel[1] > MAX_TAPS
        ):
            raise EngineError(f"expected ungrouped, undilated convolutions padded with zeros, got {module}")
        # What follows at once, and is read by nothing else: activation, gate, sum, activation.
        chain, before, after, other, gate = [node], 0, 0, -1, None
        user = _only_user(node)
        if user is not None and self._is_relu(user):
            before = 1
            chain.append(user)
            user = _only_user(user)
        if user is not None and self._is_gate(user) and user.args[1] is chain[-1]:
            gate = user
            chain.append(next(part for part in gate.users if part.target is output_of))
            user = _only_user(chain[-1])
        if user is not None and user.target in _ADDS and len(user.args) == 2 and not user.kwargs:
            operand: Any = user.args[1] if user.args[0] is chain[-1] else user.args[0]
            self._lower_shortcut(operand)
            if isinstance(operand, fx.Node) and operand in self._of and shape_of(operand) == shape_of(user):
                other = self._of[operand]
                chain.append(user)
                user = _only_user(user)
                if user is not None and self._is_relu(user):
                    after = 1
                    chain.append(user)
        first_bit = self._gate(gate) if gate is not None else -1
        out = shape_of(node)
        rows = _rows(module.in_channels, kernel[0], kernel[1], stride, out)
        bias = module.bias if module.bias is not None else torch.zeros(module.out_channels)
        step = self._add_step(
            CONVOLVE, node, node.args[0], other, {"weights": _array(module.weight), "biases": _array(bias)},
            gate=first_bit, relu_before=before, relu_after=after, kernel_h=kernel[0], kernel_w=kernel[1],
            stride=stride, padding=_same(padding), rows=rows,
        )  # fmt: skip
        for part in chain:
            self._of[part] = step.out

    def _lower_shortcut(self, node: object) -> None:
        """What a convolution's sum adds, where it is a view of a map that is there, padded perhaps, comes before it."""
        early = isinstance(node, fx.Node) and node not in self._of and node.target in (operator.getitem, F.pad)
        if isinstance(node, fx.Node) and early and "tensor_meta" in node.meta:
            self._lower_shortcut(node.args[0])
            if node.args[0] in self._of:
                self._lower(node)

    def _gate(self, node: fx.Node) -> int:
        index = int(str(node.target).removeprefix("gates."))
        gate = self._modules[str(node.target)]
        assert isinstance(gate, ChannelGate)
        if not isinstance(gate.normalise, nn.Identity):
            raise EngineError("expected gates whose normalisation could be folded, got one that could not")
        bias = gate.excite.bias if gate.excite.bias is not None else torch.zeros(gate.excite.out_features)
        self._steps.append(
            Step(
                GATE,
                -1,
                self._input(node.args[0]),
                numbers={
                    "gate": self._first_bit[index],
                    "filters": gate.excite.out_features,
                    "hidden": gate.squeeze.out_features,
                    "first_read": self._first_read[index],
                },
                arrays={
                    "weights": _array(gate.excite.weight),
                    "biases": _array(bias),
                    "squeeze": _array(gate.squeeze.weight.T),
                    "squeeze_biases": _array(gate.squeeze.bias),
                },
            )
        )
        return int(self._first_bit[index])

    def _is_relu(self, node: fx.Node) -> bool:
        return node.target in _RELUS or (
            node.op == "call_module" and type(self._modules.get(str(node.target))) is nn.ReLU
        )

    def relu(self, node: fx.Node, *_: object) -> None:
        self._add_step(RELU, node, node.args[0])

    def linear(self, node: fx.Node, module: nn.Linear) -> None:
        if (
            shape_of(node).pixels != 1
            or self._maps[self._input(node.args[0])].pixels * self._maps[self._input(node.args[0])].channels
            != module.in_features
        ):
            raise EngineError(f"expected linear maps of whole images, got {module}")
        user = _only_user(node)
        after = user is not None and self._is_relu(user)
        bias = module.bias if module.bias is not None else torch.zeros(module.out_features)
        arrays = {"weights": _array(module.weight), "biases": _array(bias)}
        step = self._add_step(LINEAR, node, node.args[0], arrays=arrays, relu_after=int(after))
        if after and user is not None:
            self._of[user] = step.out

    def normalisation(self, node: fx.Node, module: nn.BatchNorm2d) -> None:
        if module.running_var is None or module.running_mean is None:
            raise EngineError("expected normalisations with statistics, got one without")
        scale = (module.running_var + module.eps).rsqrt()
        if module.affine:
            scale = scale * module.weight
        shift = -module.running_mean * scale + (module.bias if module.affine else 0)
        self._add_step(AFFINE, node, node.args[0], arrays={"weights": _array(scale), "biases": _array(shift)})

    def pool(self, node: fx.Node, module: nn.MaxPool2d | nn.AvgPool2d) -> None:
        kernel = _same(module.kernel_size)
        stride = _same(module.stride if module.stride is not None else kernel)
        if isinstance(module, nn.MaxPool2d):
            odd = _same(module.dilation) != 1 or module.return_indices or module.ceil_mode
            counted = 0
        else:
            odd, counted = module.divisor_override is not None or module.ceil_mode, int(module.count_include_pad)
        if odd:
            raise EngineError(f"expected pooling without ceil_mode, dilation and divisor, got {module}")
        kind = MAX_POOL if isinstance(module, nn.MaxPool2d) else MEAN_POOL
        self._add_step(
            kind, node, node.args[0], kernel_h=kernel, kernel_w=kernel, stride=stride, padding=_same(module.padding),
            count_padding=counted,
        )  # fmt: skip

    def adaptive_pool(self, node: fx.Node, *_: object) -> None:
        before, after = self._maps[self._input(node.args[0])], shape_of(node)
        if after.pixels == 1:
            self._add_step(MEAN, node, node.args[0])
        elif after == before:
            self.alias(node)
        elif before.height == before.width and after.height == after.width and before.height % after.height == 0:
            kernel = before.height // after.height
            self._add_step(MEAN_POOL, node, node.args[0], kernel_h=kernel, kernel_w=kernel, stride=kernel, padding=0)
        else:
            raise EngineError(f"expected adaptive pooling of whole windows, got {before} to {after}")

    def mean(self, node: fx.Node) -> None:
        dims = node.args[1] if len(node.args) > 1 else None
        if not isinstance(dims, list | tuple) or sorted(int(d) % 4 for d in dims) != [2, 3]:
            raise EngineError(f"expected means over height and width, got {dims}")
        self._add_step(MEAN, node, node.args[0])

    def flatten(self, node: fx.Node) -> None:
        before = self._maps[self._input(node.args[0])]
        if len(tensor_shape(node)) != 2 or shape_of(node).channels != before.channels * before.pixels:
            raise EngineError(f"expected flattening to (images, features), got {tensor_shape(node)}")
        self.alias(node)

    def add(self, node: fx.Node) -> None:
        if any(self._constant(a) is not None for a in node.args):
            self._affine(node, lambda constant: (torch.ones_like(constant), constant), either_side=True)
            return
        if node.kwargs or len({self._maps[self._input(a)] for a in node.args}) != 1:
            raise EngineError(f"expected sums of two equal shapes, got {node.args}")
        user = _only_user(node)
        after = user is not None and self._is_relu(user)
        step = self._add_step(ADD, node, node.args[0], self._input(node.args[1]), relu_after=int(after))
        if after and user is not None:
            self._of[user] = step.out

    def subtract(self, node: fx.Node) -> None:
        self._affine(node, lambda constant: (torch.ones_like(constant), -constant))

    def multiply(self, node: fx.Node) -> None:
        self._affine(node, lambda constant: (constant, torch.zeros_like(constant)), either_side=True)

    def divide(self, node: fx.Node) -> None:
        self._affine(node, lambda constant: (1 / constant, torch.zeros_like(constant)))

    def _constant(self, operand: object) -> Tensor | None:
        """A number, or what the network keeps under a name, as a tensor; None for what depends on the image."""
        if isinstance(operand, int | float):
            return torch.tensor([float(operand)])
        if isinstance(operand, fx.Node) and operand.op == "get_attr":
            kept: Tensor = operator.attrgetter(str(operand.target))(self._graph).detach()
            return kept
        return None

    def _affine(
        self, node: fx.Node, parts: Callable[[Tensor], tuple[Tensor, Tensor]], either_side: bool = False
    ) -> None:
        source, operand = node.args[:2]
        value = self._constant(operand)
        if value is None and either_side:
            source, value = operand, self._constant(source)
        if value is None or node.kwargs:
            raise EngineError(f"expected arithmetic with constants of the network, got {node.args} {node.kwargs}")
        channels = self._maps[self._input(source)].channels
        if value.numel() not in (1, channels) or (value.numel() > 1 and value.shape[-3:] != (channels, 1, 1)):
            raise EngineError(f"expected a constant for each channel, got {tuple(value.shape)}")
        scale, shift = (part.expand(channels).contiguous() for part in parts(value.reshape(-1)))
        last = self._steps[-1]
        follows = isinstance(source, fx.Node) and _only_user(source) is node and self._of[source] == last.out
        if last.kind == AFFINE and follows:  # a mean taken off, then a division: one step for both
            weights, biases = (last.arrays[name] * _array(scale) for name in ("weights", "biases"))
            self._steps[-1] = replace(last, arrays={"weights": weights, "biases": biases + _array(shift)})
            self._of[node] = last.out
            return
        self._add_step(AFFINE, node, source, arrays={"weights": _array(scale), "biases": _array(shift)})

    def concatenate(self, node: fx.Node) -> None:
        parts = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else 0
        if dim not in (1, -3) or not isinstance(parts, list | tuple) or len(tensor_shape(node)) != 4:
            raise EngineError(f"expected concatenations of channels, got dim {dim}")
        joined = self._input(parts[0])
        for part in parts[1:]:
            more = self._input(part)
            before, other = self._maps[joined], self._maps[more]
            out = self._new(FeatureMap(before.channels + other.channels, before.height, before.width))
            self._steps.append(Step(CONCATENATE, out, joined, more))
            joined = out
        self._of[node] = joined

    def subsample(self, node: fx.Node) -> None:
        index = node.args[1]
        whole = slice(None, None, None)
        if not isinstance(index, tuple) or len(index) != 4 or index[:2] != (whole, whole) or index[2] != index[3]:
            raise EngineError(f"expected every n-th row and column, got {index}")
        step = index[2].step if isinstance(index[2], slice) else None
        if index[2] != slice(None, None, step) or not isinstance(step, int) or step < 1:
            raise EngineError(f"expected every n-th row and column, got {index}")
        self._add_step(SUBSAMPLE, node, node.args[0], stride=step)

    def pad(self, node: fx.Node) -> None:
        widths: Any = node.args[1]
        options = {**dict(zip(("mode", "value"), node.args[2:], strict=False)), **node.kwargs}
        mode, value = options.get("mode", "constant"), options.get("value")
        if len(widths) != 6 or any(widths[:4]) or min(widths) < 0 or mode != "constant" or value:
            raise EngineError(f"expected channels padded with zeros, got {widths}")
        self._add_step(PAD_CHANNELS, node, node.args[0], hidden=int(widths[4]))


_RELUS = (F.relu, torch.relu, "relu", "relu_")
_BY_NUMBER = (ADD, RELU, AFFINE)
_ADDS = (operator.add, operator.iadd, torch.add, "add")
_MODULES: dict[type, Callable[..., None]] = {
    nn.Conv2d: _Lowering.convolution,
    nn.Linear: _Lowering.linear,
    nn.ReLU: _Lowering.relu,
    nn.BatchNorm2d: _Lowering.normalisation,
    nn.MaxPool2d: _Lowering.pool,
    nn.AvgPool2d: _Lowering.pool,
    nn.AdaptiveAvgPool2d: _Lowering.adaptive_pool,
    nn.Flatten: lambda self, node, _: self.flatten(node),
    nn.Dropout: _Lowering.alias,
    nn.Dropout2d: _Lowering.alias,
    nn.Identity: _Lowering.alias,
}
_FUNCTIONS: dict[Any, Callable[[_Lowering, fx.Node], None]] = {
    **dict.fromkeys(_RELUS, _Lowering.relu),
    **dict.fromkeys(_ADDS, _Lowering.add),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _Lowering.subtract),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), _Lowering.multiply),
    **dict.fromkeys((operator.truediv, torch.div, "div"), _Lowering.divide),
    **dict.fromkeys((torch.flatten, "flatten", "view", "reshape", torch.reshape), _Lowering.flatten),
    **dict.fromkeys((torch.mean, "mean"), _Lowering.mean),
    F.adaptive_avg_pool2d: _Lowering.adaptive_pool,
    torch.cat: _Lowering.concatenate,
    operator.getitem: _Lowering.subsample,
    F.pad: _Lowering.pad,
    F.dropout: _Lowering.alias,
    "contiguous": _Lowering.alias,
}


# Names of operands that may be given by name, in order.
_OPERANDS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(
        (*_ADDS, operator.sub, torch.sub, "sub", operator.mul, torch.mul, "mul", operator.truediv, torch.div, "div"),
        ("input", "other"),
    ),
    **dict.fromkeys((torch.mean, "mean"), ("input", "dim")),
    torch.cat: ("tensors", "dim"),
    F.pad: ("input", "pad"),
}


def _put_in_place(node: fx.Node) -> None:
    """Move operands that are given by name to where the handlers look for them."""
    args, named = list(node.args), dict(node.kwargs)
    for name in _OPERANDS.get(node.target, ("input",))[len(args) :]:
        if name not in named:
            break
        args.append(named.pop(name))
    node.args, node.kwargs = tuple(args), named


def tensor_shape(node: fx.Node) -> torch.Size:
    """The shape of a node's value for one image."""
    found = node.meta.get("tensor_meta")
    if found is None or not hasattr(found, "shape"):
        raise EngineError(f"expected tensors between layers, got {node.target}")
    return torch.Size(found.shape)


def shape_of(node: fx.Node) -> FeatureMap:
    """The same as channels, height and width."""
    shape = tensor_shape(node)
    if len(shape) not in (2, 4) or shape[0] != 1:
        raise EngineError(f"expected (images, channels, height, width) between layers, got {tuple(shape)}")
    return FeatureMap(shape[1], *(shape[2:] if len(shape) == 4 else (1, 1)))


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _same(pair: Any) -> int:
    values = set(pair) if isinstance(pair, tuple | list) else {pair}
    if len(values) != 1:
        raise EngineError(f"expected equal steps in height and width, got {pair}")
    return int(values.pop())


def _rows(channels: int, kernel_h: int, kernel_w: int, stride: int, out: FeatureMap) -> int:
    """Output rows for which the input is laid out at a time."""
    row = channels * laid_out(kernel_h, kernel_w, stride, out.width)
    few = -(-64 // out.width)  # no fewer than what fills the registers
    return min(out.height, max(few, SCRATCH // row - (kernel_h - 1) // stride))


def laid_out(kernel_h: int, kernel_w: int, stride: int, width: int) -> int:
    """Floats of a channel that are laid out for one more row of an output of this width."""
    if stride == 1 and width % ALIGNMENT == 0:  # whole vectors make up a row
        return width + kernel_w - 1
    return kernel_w * min(stride, kernel_h) * width


def _array(tensor: Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().float().numpy())
