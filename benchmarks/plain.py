"""The plain network as the opponent: the same images, ready as a tensor, in each engine that a user may have."""

import copy
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks.onnx_sessions import onnx_call
from detector.batches import to_tensor
from detector.images import Pixels

CPU = torch.device("cpu")
EAGER, COMPILED, ONNX = "torch eager", "torch.compile", "ONNX Runtime"


def plain_sides(network: nn.Module, pixels: Pixels, compiled: bool) -> dict[str, Callable[[Pixels], object]]:
    """`network`, in evaluation mode, in each engine; what is given to a call is left aside.

    Args:
        network: images in [0, 1] -> logits.
        pixels: the images of every call.
        compiled: whether torch.compile is among them; it takes up to minutes.
    """
    images = to_tensor(pixels, CPU)
    sides: dict[str, Callable[[Pixels], object]] = {EAGER: lambda _: forward(network, images)}
    if compiled:
        faster = torch.compile(copy.deepcopy(network))
        sides[COMPILED] = lambda _: forward(faster, images)
    session = onnx_call(network, images)
    if session is not None:
        sides[ONNX] = lambda _: session()
    return sides


def best_of(times: Mapping[str, float]) -> float:
    """The least time of the plain network, in any engine."""
    return min(times[side] for side in (EAGER, COMPILED, ONNX) if side in times)


def forward(network: Callable[[torch.Tensor], object], images: torch.Tensor) -> object:
    """One pass without gradients."""
    with torch.inference_mode():
        return network(images)


def each_image(call: Callable[[Pixels], object], pool: Pixels) -> Callable[[], object]:
    """A call on the next image of `pool` each time, so that no path is warm by chance."""
    turns = itertools.cycle(range(len(pool)))

    def run() -> object:
        turn = next(turns)
        return call(pool[turn : turn + 1])

    return run
