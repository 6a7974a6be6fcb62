"""Skipping in torch eager: for each image, weights cut down to what its path leaves, given to the stock convolution.

Feature maps hold open channels only, so that nothing is read or copied for closed ones. What costs time at one small
image is the number of calls into torch: gates and cuts are computed beside it (see `detector.engines.cuts`), and what
a step needs is looked up when the engine is made.
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
from detector.engines.cuts import cut_of, gate_of
from detector.engines.engine import Answers
from detector.engines.program import FeatureMap, Program, Step
from detector.images import Pixels
from detector.paths.encoder import Evidence
from detector.paths.path_encoding import PathEncoding


class _Value(NamedTuple):
    """A feature map: its open channels, `(1, open, height, width)`, and their numbers; None for all."""

    tensor: Tensor
    open: Tensor | None


class _Image(NamedTuple):
    """What is known of one image so far: maps by number, open filters by the first bit of their gate, gate logits."""

    values: dict[int, _Value]
    opened: dict[int, Tensor]
    gate_logits: Tensor


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
        with torch.inference_mode():
            for index in range(len(pixels)):
                values = {self._image: _Value(to_tensor(pixels[index : index + 1], _CPU), None)}
                image = _Image(values, {}, gate_logits[index])
                for step in self._steps:
                    step(image)
                class_logits[index] = values[self._program.result].tensor.reshape(-1).numpy()
        logits = gate_logits.numpy()
        return Answers(Evidence(class_logits, logits, PathEncoding(logits > 0, self._program.layers)))


_CPU = torch.device("cpu")


def _step(step: Step, program: Program, compiled: bool) -> Callable[[_Image], None]:
    if step.kind == kinds.GATE:
        gate, first, source = gate_of(step, compiled), step.numbers["gate"], step.input

        def decide(image: _Image) -> None:
            value = image.values[source]
            image.opened[first] = gate(value.tensor, value.open, image.gate_logits)

        return decide
    if step.kind == kinds.CONVOLVE:
        return _convolution(step, compiled)
    tensors = {name: torch.from_numpy(array) for name, array in step.arrays.items()}
    return partial(_run_other, step, tensors, program.maps[step.input], program.maps[step.out])


def _convolution(step: Step, compiled: bool) -> Callable[[_Image], None]:
    cut, kept, filters = cut_of(step, compiled), step.arrays.get("kept"), len(step.arrays["biases"])
    first, stride, padding = (step.numbers[name] for name in ("gate", "stride", "padding"))
    relu_before, relu_after = step.numbers["relu_before"], step.numbers["relu_after"]

    def convolve(image: _Image) -> None:
        tensor, read = image.values[step.input]
        made = image.opened[first] if first >= 0 else None
        if made is not None and kept is not None:
            made = _among(made, kept)
        weights, biases = cut(read, made)
        if made is not None and not made.numel():
            out = tensor.new_zeros(1, 0, *_size_after(step.numbers, tensor))
        elif read is not None and not read.numel():
            out = biases[None, :, None, None].expand(1, -1, *_size_after(step.numbers, tensor)).clone()
        else:
            out = torch.conv2d(tensor, weights, biases, stride, padding)
        if relu_before:
            out.relu_()
        value = _Value(out, made)
        if step.other >= 0:
            value = _sum(value, image.values[step.other], filters)
            if relu_after:
                value.tensor.relu_()
        image.values[step.out] = value

    return convolve


def _among(made: Tensor, kept: npt.NDArray[np.int32]) -> Tensor:
    """The open filters' places among those that are kept."""
    return torch.from_numpy(np.flatnonzero(np.isin(kept, made.numpy())))


def _sum(one: _Value, other: _Value, channels: int) -> _Value:
    """The sum of both, in memory of its own or of `one`."""
    if one.open is None and other.open is None:
        return _Value(one.tensor.add_(other.tensor), None)
    if one.open is None:
        assert other.open is not None
        return _Value(one.tensor.index_add_(1, other.open, other.tensor), None)
    whole = other.tensor if other.open is None else _whole(other, channels).tensor
    return _Value(torch.index_add(whole, 1, one.open, one.tensor), None)


def _whole(value: _Value, channels: int) -> _Value:
    """With zeros in the place of closed channels."""
    if value.open is None:
        return value
    zeros = value.tensor.new_zeros(1, channels, *value.tensor.shape[2:])
    return _Value(zeros.index_copy_(1, value.open, value.tensor), None)


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


def _size_after(numbers: Mapping[str, int], tensor: Tensor) -> tuple[int, int]:
    height, width = (
        (side + 2 * numbers["padding"] - numbers[kernel]) // numbers["stride"] + 1
        for side, kernel in zip(tensor.shape[2:], ("kernel_h", "kernel_w"), strict=True)
    )
    return height, width
