"""What a path leaves of a layer: the gate's word on one image, the weights of open filters for open channels, and sums
of maps that hold open channels alone.

Each is a few microseconds of arithmetic, which a dozen calls into NumPy or torch cost many times over: where the
compiled library is built it does each in one call, and they elsewhere.
"""

import ctypes
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from detector.engines.library import layout_of, library
from detector.engines.program import Step
from detector.errors import EngineError


class Gate(Protocol):
    """A gate, for maps that hold open channels only."""

    def __call__(self, tensor: Tensor, read: Tensor | None, gate_logits: Tensor, means: Tensor) -> Tensor:
        """The numbers of the filters that open, ascending, `int64`.

        Args:
            tensor: the map that the gate reads, `(1, channels, height, width)`.
            read: numbers of its channels, `int64`, `(channels,)`; None for all.
            gate_logits: of the whole path, `(filters,)`; the gate writes its own.
            means: of all channels that gates read, `(channels read,)`; likewise, of open channels alone.
        """


class Cut(Protocol):
    """A convolution's weights."""

    def __call__(self, read: Tensor | None, made: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and biases of the filters `made` for the channels `read`, each by its numbers; None for all."""


class Sum(Protocol):
    """The sum of two maps, activated or not."""

    def __call__(self, one: Tensor, one_open: Tensor | None, other: Tensor, other_open: Tensor | None) -> Tensor:
        """All channels, `(1, channels, height, width)`, in memory of its own.

        Args:
            one: open channels, `(1, open, height, width)`.
            one_open: their numbers, ascending, `int64`; None for all.
            other: open channels of another map.
            other_open: likewise.
        """


def gate_of(step: Step, compiled: bool = True) -> Gate:
    """The gate of a step.

    Args:
        step: a gate.
        compiled: whether the compiled library is used where there is one.
    """
    return _CompiledGate(step) if compiled and _has_library() else _NumpyGate(step)


def cut_of(step: Step, compiled: bool = True) -> Cut:
    """The weights of a step.

    Args:
        step: a convolution.
        compiled: as for `gate_of`.
    """
    return _CompiledCut(step) if compiled and _has_library() else _NumpyCut(step)


def sum_of(channels: int, relu: bool, compiled: bool = True) -> Sum:
    """The sum of two maps of so many channels.

    Args:
        channels: of each, open and closed.
        relu: whether negative sums become zero.
        compiled: as for `gate_of`.
    """
    return _CompiledSum(channels, relu) if compiled and _has_library() else _TorchSum(channels, relu)


def _has_library() -> bool:
    try:
        library()
    except EngineError:
        return False
    return True


class _CompiledGate:
    def __init__(self, step: Step) -> None:
        self._call = library().pathguard_gate
        self._step = step  # the library reads its arrays where they lie
        self._layout = layout_of(step, step.arrays)
        self._pointer = ctypes.addressof(self._layout)
        self._filters, self._first = step.numbers["filters"], step.numbers["gate"]
        self._room = self._filters + step.numbers["hidden"] // 2 + 1

    def __call__(self, tensor: Tensor, read: Tensor | None, gate_logits: Tensor, means: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        _, channels, height, width = tensor.shape
        numbers = torch.empty(self._room, dtype=torch.int64)  # behind them lie the gate's units
        opened = numbers.data_ptr()
        count = self._call(
            self._pointer, tensor.data_ptr(), None if read is None else read.data_ptr(), channels, height * width,
            opened + 8 * self._filters, gate_logits.data_ptr() + 4 * self._first, means.data_ptr(), opened,
        )  # fmt: skip
        return numbers[:count]


class _CompiledCut:
    def __init__(self, step: Step) -> None:
        self._call = library().pathguard_cut
        self._step = step
        self._layout = layout_of(step, step.arrays)
        self._pointer = ctypes.addressof(self._layout)
        self._whole = _tensors(step)
        self._filters, self._channels, self._height, self._width = step.arrays["weights"].shape

    def __call__(self, read: Tensor | None, made: Tensor | None) -> tuple[Tensor, Tensor]:
        if read is None and made is None:
            return self._whole
        reads = self._channels if read is None else read.numel()
        makes = self._filters if made is None else made.numel()
        weights, biases = torch.empty(makes, reads, self._height, self._width), torch.empty(makes)
        self._call(
            self._pointer, self._channels, None if read is None else read.data_ptr(), reads,
            None if made is None else made.data_ptr(), makes, weights.data_ptr(), biases.data_ptr(),
        )  # fmt: skip
        return weights, biases


class _CompiledSum:
    def __init__(self, channels: int, relu: bool) -> None:
        self._call = library().pathguard_sum
        self._channels, self._relu = channels, relu

    def __call__(self, one: Tensor, one_open: Tensor | None, other: Tensor, other_open: Tensor | None) -> Tensor:
        one, other = one.contiguous(), other.contiguous()
        _, ones, height, width = one.shape
        summed = torch.empty(1, self._channels, height, width)
        self._call(
            one.data_ptr(), None if one_open is None else one_open.data_ptr(), ones,
            other.data_ptr(), None if other_open is None else other_open.data_ptr(), other.shape[1],
            self._channels, height * width, self._relu, summed.data_ptr(),
        )  # fmt: skip
        return summed


class _NumpyGate:
    def __init__(self, step: Step) -> None:
        self._arrays = step.arrays
        self._own = slice(step.numbers["gate"], step.numbers["gate"] + step.numbers["filters"])
        self._first_read = step.numbers["first_read"]

    def __call__(self, tensor: Tensor, read: Tensor | None, gate_logits: Tensor, means: Tensor) -> Tensor:
        arrays = self._arrays
        pooled = tensor.mean((2, 3))[0].numpy()
        squeeze = arrays["squeeze"] if read is None else arrays["squeeze"].take(read.numpy(), axis=0)
        places = np.arange(len(squeeze)) if read is None else read.numpy()
        if (kept := arrays.get("kept")) is not None:
            places = kept[places]
        means.numpy()[self._first_read + places] = pooled
        units = pooled @ squeeze
        units += arrays["squeeze_biases"]
        logits = arrays["weights"] @ np.maximum(units, 0, out=units)
        logits += arrays["biases"]
        gate_logits.numpy()[self._own] = logits
        return torch.from_numpy((logits > 0).nonzero()[0])


class _NumpyCut:
    def __init__(self, step: Step) -> None:
        self._weights, self._biases = step.arrays["weights"], step.arrays["biases"]
        self._whole = _tensors(step)

    def __call__(self, read: Tensor | None, made: Tensor | None) -> tuple[Tensor, Tensor]:
        if read is None and made is None:
            return self._whole
        filters, channels, *window = self._weights.shape
        rows = np.arange(filters) if made is None else made.numpy()
        if read is None:
            taken = self._weights.take(rows, axis=0)
        else:
            pairs = rows[:, None] * channels + read.numpy()
            taken = self._weights.reshape(filters * channels, *window).take(pairs, axis=0)
        return torch.from_numpy(taken), torch.from_numpy(self._biases.take(rows))


class _TorchSum:
    def __init__(self, channels: int, relu: bool) -> None:
        self._channels, self._relu = channels, relu

    def __call__(self, one: Tensor, one_open: Tensor | None, other: Tensor, other_open: Tensor | None) -> Tensor:
        if one_open is None:
            one, one_open, other, other_open = other, other_open, one, None
        whole = other if other_open is None else with_closed(other, other_open, self._channels)
        summed = whole + one if one_open is None else torch.index_add(whole, 1, one_open, one)
        return summed.relu_() if self._relu else summed


def with_closed(tensor: Tensor, opened: Tensor | None, channels: int) -> Tensor:
    """A map of so many channels with zeros in the place of closed ones.

    Args:
        tensor: its open channels, `(1, open, height, width)`.
        opened: their numbers, `int64`; None for all.
        channels: open and closed.
    """
    if opened is None:
        return tensor
    return tensor.new_zeros(1, channels, *tensor.shape[2:]).index_copy_(1, opened, tensor)


def _tensors(step: Step) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(step.arrays["weights"]), torch.from_numpy(step.arrays["biases"])
