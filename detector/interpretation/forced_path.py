"""A network whose filters are opened and closed by somebody else than its gates."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from detector.network.decouple import GatedNet
from detector.network.gates import GateReading


@contextmanager
def forced_path(network: GatedNet, states: Tensor) -> Iterator[None]:
    """Within it, filters are in the given states, whatever the gates say; gates still say what they would.

    Hooks on the gates do it, so that the network itself knows nothing of it; other threads must not run it meanwhile.

    Args:
        network: in evaluation mode.
        states: 1 for open, 0 for closed, NaN for as the gate says, `(images or 1, filters of all gates)`.
    """
    handles, start = [], 0
    for gate, width in zip(network.gates(), network.layers.values(), strict=True):
        forced = _Forced(states[:, start : start + width])
        start += width
        handles += [gate.register_forward_pre_hook(forced.keep), gate.register_forward_hook(forced.force)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Forced:
    """The states of one gate's filters. A gate may mask its output where it lies, so a copy is kept before it does."""

    def __init__(self, states: Tensor) -> None:
        self._states = states
        self._output = torch.empty(0)

    def keep(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._output = arguments[1].clone()

    def force(
        self, _: nn.Module, __: tuple[Any, ...], answer: tuple[Tensor, GateReading]
    ) -> tuple[Tensor, GateReading]:
        reading = answer[1]
        states = self._states.to(reading.mask)
        mask = torch.where(states.isnan(), reading.mask, states)
        output, self._output = self._output * mask[:, :, None, None], torch.empty(0)
        return output, replace(reading, mask=mask)
