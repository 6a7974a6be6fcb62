"""Skipping in torch eager: for each image, weights cut down to what its path leaves, given to the stock convolution.

Feature maps hold open channels only, so that nothing is read or copied for closed ones. What costs time at one small
image is the number of calls into torch: gates, a few hundred multiplications each, are computed in NumPy instead.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from detector.batches import to_tensor
from detector.engines import program as kinds
from detector.engines.engine import Answers
from detector.engines.program import FeatureMap, Program, Step
from detector.images import Pixels
from detector.paths.encoder import Evidence, Floats
from detector.paths.path_encoding import PathEncoding

Numbers = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class _Open:
    """Which channels a compact map holds."""

    numbers: Numbers
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class _Value:
    """A feature map: its open channels, `(1, open, height, width)`, and which they are; None for all."""

    tensor: Tensor
    open: _Open | None


class SlicedEngine:
    """A decoupled network in torch eager, image by image, without closed filters and channels."""

    name = "sliced"

    def __init__(self, program: Program) -> None:
        """Take the steps of `program`."""
        self._program = program
        self._tensors = [
            {name: torch.from_numpy(array) for name, array in step.arrays.items()} for step in self._program.steps
        ]

    def answer(self, pixels: Pixels) -> Answers:
        """As `Engine.answer`."""
        class_logits = np.empty((len(pixels), self._program.classes), np.float32)
        gate_logits = np.empty((len(pixels), self._program.filters), np.float32)
        with torch.inference_mode():
            for index in range(len(pixels)):
                class_logits[index] = self._run(to_tensor(pixels[index : index + 1], _CPU), gate_logits[index])
        return Answers(Evidence(class_logits, gate_logits, PathEncoding(gate_logits > 0, self._program.layers)))

    def _run(self, image: Tensor, gate_logits: Floats) -> Floats:
        values: dict[int, _Value] = {}
        opened: dict[int, _Open] = {}
        for step, tensors in zip(self._program.steps, self._tensors, strict=True):
            if step.kind == kinds.GATE:
                opened[step.numbers["gate"]] = _gate(step, values[step.input], gate_logits)
            elif step.kind == kinds.PIXELS:
                values[step.out] = _Value(image, None)
            elif step.kind == kinds.CONVOLVE:
                other = values[step.other] if step.other >= 0 else None
                gate = opened.get(step.numbers["gate"])
                if gate is not None and "kept" in step.arrays:
                    gate = _among(gate, step.arrays["kept"])
                values[step.out] = _convolution(step, tensors, values[step.input], gate, other)
            else:
                other = values[step.other] if step.other >= 0 else None
                maps = self._program.maps
                values[step.out] = _other(step, tensors, values[step.input], other, maps[step.input], maps[step.out])
        logits: Floats = values[self._program.result].tensor.reshape(-1).numpy()
        return logits


_CPU = torch.device("cpu")


def _gate(step: Step, value: _Value, gate_logits: Floats) -> _Open:
    arrays, first = step.arrays, step.numbers["gate"]
    tensor = value.tensor
    channels, pixels = tensor.shape[1], tensor.shape[2] * tensor.shape[3]
    summed = tensor.reshape(channels, pixels).sum(1).numpy()
    squeeze = arrays["squeeze"] if value.open is None else arrays["squeeze"].take(value.open.numbers, axis=0)
    units = summed @ squeeze
    units /= pixels
    units += arrays["squeeze_biases"]
    logits = arrays["weights"] @ np.maximum(units, 0, out=units)
    logits += arrays["biases"]
    gate_logits[first : first + len(logits)] = logits
    numbers = (logits > 0).nonzero()[0]
    return _Open(numbers, torch.from_numpy(numbers))


def _among(gate: _Open, kept: npt.NDArray[np.int32]) -> _Open:
    """The open filters' places among those that are kept."""
    numbers = np.flatnonzero(np.isin(kept, gate.numbers))
    return _Open(numbers, torch.from_numpy(numbers))


def _convolution(
    step: Step, tensors: dict[str, Tensor], value: _Value, gate: _Open | None, other: _Value | None
) -> _Value:
    weights, biases = _cut_weights(step, tensors, value.open, gate)
    numbers = step.numbers
    if gate is not None and not len(gate.numbers):
        made = value.tensor.new_zeros(1, 0, *_size_after(numbers, value.tensor))
    elif value.open is not None and not len(value.open.numbers):
        made = biases[None, :, None, None].expand(1, -1, *_size_after(numbers, value.tensor)).clone()
    else:
        made = torch.conv2d(value.tensor, weights, biases, numbers["stride"], numbers["padding"])
    if numbers["relu_before"]:
        made.relu_()
    if other is None:
        return _Value(made, gate)
    summed = _sum(_Value(made, gate), other, len(tensors["biases"]))
    if numbers["relu_after"]:
        summed.tensor.relu_()
    return summed


def _cut_weights(
    step: Step, tensors: dict[str, Tensor], read: _Open | None, made: _Open | None
) -> tuple[Tensor, Tensor]:
    """Weights and biases of the open filters, for the open channels: one copy. NumPy takes small ones sooner."""
    weights, biases = step.arrays["weights"], step.arrays["biases"]
    filters, channels, *window = weights.shape
    if made is None and read is None:
        return tensors["weights"], tensors["biases"]
    if read is None:
        assert made is not None
        taken = weights.take(made.numbers, axis=0)
    else:
        rows = np.arange(filters) if made is None else made.numbers
        pairs = rows[:, None] * channels + read.numbers
        taken = weights.reshape(filters * channels, *window).take(pairs, axis=0)
    cut = tensors["biases"] if made is None else torch.from_numpy(biases.take(made.numbers))
    return torch.from_numpy(taken), cut


def _sum(one: _Value, other: _Value, channels: int) -> _Value:
    """The sum of both, in memory of its own or of `one`."""
    if one.open is None and other.open is None:
        return _Value(one.tensor.add_(other.tensor), None)
    if one.open is None:
        assert other.open is not None
        return _Value(one.tensor.index_add_(1, other.open.tensor, other.tensor), None)
    whole = other.tensor if other.open is None else _whole(other, channels).tensor
    return _Value(torch.index_add(whole, 1, one.open.tensor, one.tensor), None)


def _whole(value: _Value, channels: int) -> _Value:
    """With zeros in the place of closed channels."""
    if value.open is None:
        return value
    zeros = value.tensor.new_zeros(1, channels, *value.tensor.shape[2:])
    return _Value(zeros.index_copy_(1, value.open.tensor, value.tensor), None)


def _other(
    step: Step, tensors: dict[str, Tensor], value: _Value, other: _Value | None, before: FeatureMap, after: FeatureMap
) -> _Value:
    if not value.tensor.shape[1]:  # torch pools no image without channels
        value = _whole(value, before.channels)
    numbers, tensor = step.numbers, value.tensor
    match step.kind:
        case kinds.RELU:
            return _Value(tensor.relu(), value.open)
        case kinds.MEAN:
            return _Value(tensor.mean((2, 3), keepdim=True), value.open)
        case kinds.SUBSAMPLE:
            return _Value(tensor[:, :, :: numbers["stride"], :: numbers["stride"]], value.open)
        case kinds.MAX_POOL:
            return _Value(F.max_pool2d(tensor, numbers["kernel_h"], numbers["stride"], numbers["padding"]), value.open)
        case kinds.MEAN_POOL:
            counted = bool(numbers.get("count_padding", 0))
            pooled = F.avg_pool2d(
                tensor, numbers["kernel_h"], numbers["stride"], numbers["padding"], count_include_pad=counted
            )
            return _Value(pooled, value.open)
    whole = _whole(value, before.channels).tensor
    match step.kind:
        case kinds.AFFINE:
            scale, shift = (tensors[name][None, :, None, None] for name in ("weights", "biases"))
            return _Value(torch.addcmul(shift, whole, scale), None)
        case kinds.LINEAR:
            made = F.linear(whole.flatten(1), tensors["weights"], tensors["biases"])
            return _Value((made.relu_() if numbers["relu_after"] else made)[:, :, None, None], None)
        case kinds.PAD_CHANNELS:
            behind = after.channels - before.channels - numbers["hidden"]
            return _Value(F.pad(whole, (0, 0, 0, 0, numbers["hidden"], behind)), None)
        case kinds.CONCATENATE:
            assert other is not None
            more = _whole(other, after.channels - before.channels).tensor
            return _Value(torch.cat([whole, more], dim=1), None)
        case _:  # ADD
            assert other is not None
            summed = _sum(_Value(whole.clone(), None), other, after.channels)
            return _Value(summed.tensor.relu_() if numbers["relu_after"] else summed.tensor, None)


def _size_after(numbers: object, tensor: Tensor) -> tuple[int, int]:
    assert isinstance(numbers, dict)
    height, width = (
        (side + 2 * numbers["padding"] - numbers[kernel]) // numbers["stride"] + 1
        for side, kernel in zip(tensor.shape[2:], ("kernel_h", "kernel_w"), strict=True)
    )
    return height, width
