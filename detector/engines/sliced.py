"""Skipping in torch eager: for each image, weights cut down to what its path leaves, given to the stock convolution.

Feature maps hold open channels only, so that nothing is read or copied for closed ones. What costs time at one small
image is the number of calls into torch: gates, cuts and sums are computed beside it (see `detector.engines.cuts`), and
what a step needs is looked up when the engine is made.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from detector.batches import to_tensor
from detector.engines import program as kinds
from detector.engines.cuts import cut_of, gate_of, sum_of, with_closed
from detector.engines.engine import Answers
from detector.engines.program import FeatureMap, Program, Step
from detector.images import Pixels
from detector.paths.encoder import Evidence
from detector.paths.gate_inputs import GateInputs
from detector.paths.path_encoding import PathEncoding


class _Value(NamedTuple):
    """A feature map: its open channels, `(1, open, height, width)`, and their numbers; None for all."""

    tensor: Tensor
    open: Tensor | None


class _Image(NamedTuple):
    """What is known of an image: maps by number, open filters by their gate's first bit, what gates say and read."""

    values: dict[int, _Value]
    opened: dict[int, Tensor]
    gate_logits: Tensor
    means: Tensor


class SlicedEngine:
    """A decoupled network in torch eager, image by image, without closed filters and channels."""

    name = "sliced"

    def __init__(self, program: Program, compiled: bool = True) -> None:
        """Take the steps of `program`.

        Args:
            program: of the decoupled network.
            compiled: whether the compiled library computes gates and cuts, where it is built.
        """
        self._program = program
        self._steps = [_step(step, program, compiled) for step in program.steps if step.kind != kinds.PIXELS]
        self._image = next(step.out for step in program.steps if step.kind == kinds.PIXELS)

    def answer(self, pixels: Pixels) -> Answers:
        """As `Engine.answer`."""
        class_logits = np.empty((len(pixels), self._program.classes), np.float32)
        gate_logits = torch.empty(len(pixels), self._program.filters)
        means = torch.zeros(len(pixels), self._program.channels_read)
        with torch.inference_mode():
            for index in range(len(pixels)):
                values = {self._image: _Value(to_tensor(pixels[index : index + 1], _CPU), None)}
                image = _Image(values, {}, gate_logits[index], means[index])
                for step in self._steps:
                    step(image)
                class_logits[index] = values[self._program.result].tensor.reshape(-1).numpy()
        logits = gate_logits.numpy()
        path, inputs = PathEncoding(logits > 0, self._program.layers), GateInputs(means.numpy(), self._program.reads)
        return Answers(Evidence(class_logits, logits, path, inputs))


_CPU = torch.device("cpu")


def _step(step: Step, program: Program, compiled: bool) -> Callable[[_Image], None]:
    before, after = program.maps[step.input], program.maps[step.out]
    match step.kind:
        case kinds.GATE:
            return _gate(step, compiled)
        case kinds.CONVOLVE:
            return _convolution(step, compiled, _read_by_max_pool_alone(step.out, program))
        case kinds.ADD:
            return _addition(step, before.channels, compiled)
        case kinds.AFFINE:
            return _affine(step, before)
    tensors = {name: torch.from_numpy(array) for name, array in step.arrays.items()}
    return partial(_run_other, step, tensors, before, after)


def _read_by_max_pool_alone(number: int, program: Program) -> bool:
    readers = [step.kind for step in program.steps if number in (step.input, step.other)]
    return bool(readers) and set(readers) == {kinds.MAX_POOL}


def _gate(step: Step, compiled: bool) -> Callable[[_Image], None]:
    gate, first, source = gate_of(step, compiled), step.numbers["gate"], step.input

    def decide(image: _Image) -> None:
        value = image.values[source]
        image.opened[first] = gate(value.tensor, value.open, image.gate_logits, image.means)

    return decide


def _convolution(step: Step, compiled: bool, channels_last: bool) -> Callable[[_Image], None]:
    cut, kept, filters = cut_of(step, compiled), step.arrays.get("kept"), len(step.arrays["biases"])
    first, stride, padding = (step.numbers[name] for name in ("gate", "stride", "padding"))
    relu_before = step.numbers["relu_before"]
    add = sum_of(filters, bool(step.numbers["relu_after"]), compiled) if step.other >= 0 else None
    whole: tuple[Tensor, Tensor] | None = None
    if channels_last and first < 0:  # as its weights lie, so does what it makes
        weights, biases = cut(None, None)
        whole = weights.contiguous(memory_format=torch.channels_last), biases

    def convolve(image: _Image) -> None:
        tensor, read = image.values[step.input]
        made = image.opened[first] if first >= 0 else None
        if made is not None and kept is not None:
            made = _among(made, kept)
        weights, biases = whole if whole is not None and read is None else cut(read, made)
        if made is not None and not made.numel():
            out = tensor.new_zeros(1, 0, *_size_after(step.numbers, tensor))
        elif read is not None and not read.numel():
            out = biases[None, :, None, None].expand(1, -1, *_size_after(step.numbers, tensor)).clone()
        else:
            out = torch.conv2d(tensor, weights, biases, stride, padding)
        if relu_before:
            out.relu_()
        if add is None:
            image.values[step.out] = _Value(out, made)
        else:
            image.values[step.out] = _Value(add(out, made, *image.values[step.other]), None)

    return convolve


def _among(made: Tensor, kept: npt.NDArray[np.int32]) -> Tensor:
    """The open filters' places among those that are kept."""
    return torch.from_numpy(np.flatnonzero(np.isin(kept, made.numpy())))


def _addition(step: Step, channels: int, compiled: bool) -> Callable[[_Image], None]:
    add = sum_of(channels, bool(step.numbers["relu_after"]), compiled)

    def run(image: _Image) -> None:
        image.values[step.out] = _Value(add(*image.values[step.input], *image.values[step.other]), None)

    return run


def _affine(step: Step, before: FeatureMap) -> Callable[[_Image], None]:
    scale, shift = (torch.from_numpy(step.arrays[name])[None, :, None, None] for name in ("weights", "biases"))

    def run(image: _Image) -> None:
        value = image.values[step.input]
        whole = with_closed(value.tensor, value.open, before.channels)
        image.values[step.out] = _Value(torch.addcmul(shift, whole, scale), None)

    return run


def _run_other(step: Step, tensors: Mapping[str, Tensor], before: FeatureMap, after: FeatureMap, image: _Image) -> None:
    other = image.values[step.other] if step.other >= 0 else None
    image.values[step.out] = _other(step, tensors, image.values[step.input], other, before, after)


def _other(
    step: Step,
    tensors: Mapping[str, Tensor],
    value: _Value,
    other: _Value | None,
    before: FeatureMap,
    after: FeatureMap,
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
            # Torch takes the maximum of many channels at a time, but of one pixel after the other.
            last = tensor.contiguous(memory_format=torch.channels_last)
            pooled = F.max_pool2d(last, numbers["kernel_h"], numbers["stride"], numbers["padding"])
            return _Value(pooled.contiguous(), value.open)
        case kinds.MEAN_POOL:
            counted = bool(numbers.get("count_padding", 0))
            pooled = F.avg_pool2d(
                tensor, numbers["kernel_h"], numbers["stride"], numbers["padding"], count_include_pad=counted
            )
            return _Value(pooled, value.open)
    whole = _whole(value, before.channels).tensor
    match step.kind:
        case kinds.LINEAR:
            made = F.linear(whole.flatten(1), tensors["weights"], tensors["biases"])
            return _Value((made.relu_() if numbers["relu_after"] else made)[:, :, None, None], None)
        case kinds.PAD_CHANNELS:
            behind = after.channels - before.channels - numbers["hidden"]
            return _Value(F.pad(whole, (0, 0, 0, 0, numbers["hidden"], behind)), None)
        case _:  # CONCATENATE
            assert other is not None
            more = _whole(other, after.channels - before.channels).tensor
            return _Value(torch.cat([whole, more], dim=1), None)


def _whole(value: _Value, channels: int) -> _Value:
    """With zeros in the place of closed channels."""
    return _Value(with_closed(value.tensor, value.open, channels), None)


def _size_after(numbers: Mapping[str, int], tensor: Tensor) -> tuple[int, int]:
    height, width = (
        (side + 2 * numbers["padding"] - numbers[kernel]) // numbers["stride"] + 1
        for side, kernel in zip(tensor.shape[2:], ("kernel_h", "kernel_w"), strict=True)
    )
    return height, width
