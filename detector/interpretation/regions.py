"""Where in an image filters are excited together."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.batches import device_of
from detector.interpretation.concepts import Combination
from detector.network.decouple import GatedNet

# A region is the smallest box around the pixels that hold this share of the peak's gradient.
_SHARE = 0.6
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Region:
    """The part of an image that a combination looks at.

    Attributes:
        excitement: how strongly its filters fire together at their joint peak, above 0, without unit.
        top: first row of pixels.
        left: first column.
        height: rows.
        width: columns.
    """

    excitement: float
    top: int
    left: int
    height: int
    width: int


def find_regions(network: GatedNet, images: Tensor, combination: Combination) -> list[Region]:
    """The region of each image that excites a combination most.

    Each filter's map is scaled by its mean over the images and to the finest grid among the filters; their geometric
    mean is high only where all of them fire. The region is where the joint peak's gradient on the pixels lies: the part
    of its receptive field that matters.

    Args:
        network: in evaluation mode.
        images: in [0, 1], `(images, channels, height, width)`, at least one.
        combination: which filters.
    """
    images = images.to(device_of(network)).detach().requires_grad_()
    joint = _joint_maps(network, images, combination)
    peaks = joint.flatten(1).max(dim=1).values
    (slope,) = torch.autograd.grad(peaks.sum(), [images])
    weight = slope.abs().sum(dim=1).cpu().numpy().astype(np.float64)
    return [_region(float(peak), of_image) for peak, of_image in zip(peaks.tolist(), weight, strict=True)]


def _joint_maps(network: GatedNet, images: Tensor, combination: Combination) -> Tensor:
    """How strongly all filters of a combination fire at each place, `(images, height, width)`."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], answer: tuple[Tensor, Any]) -> None:
        outputs.append(answer[0])

    handles = [gate.register_forward_hook(keep) for gate in network.gates()]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    maps: list[Tensor] = []
    start = 0
    for output in outputs:
        inside = [place - start for place in combination.filters if start <= place < start + output.shape[1]]
        start += output.shape[1]
        # A convolution before a shortcut has no activation of its own: what it takes away does not count as firing.
        maps += [output[:, place : place + 1].relu() for place in inside]
    finest = max((one.shape[2:] for one in maps), key=lambda size: size[0] * size[1])
    scaled = [one / one.detach().mean().clamp_min(_TINY) for one in maps]
    resized = [F.interpolate(one, finest, mode="bilinear", align_corners=False)[:, 0] for one in scaled]
    joint: Tensor = torch.stack([(one + 1e-3).log() for one in resized]).mean(dim=0).exp()
    return joint


def _region(excitement: float, weight: npt.NDArray[np.float64]) -> Region:
    if weight.sum() <= 0:
        return Region(excitement, 0, 0, *weight.shape)
    bounds = []
    for axis in (1, 0):
        sums = weight.sum(axis=axis)
        bounds.append(_shortest(sums / sums.sum()))
    (top, bottom), (left, right) = bounds
    return Region(excitement, top, left, bottom - top, right - left)


def _shortest(shares: npt.NDArray[np.float64]) -> tuple[int, int]:
    """The shortest run of places that holds `_SHARE` of the whole: its first place and the one behind its last."""
    ends = np.concatenate([[0.0], np.cumsum(shares)])
    best = (0, len(shares))
    for first in range(len(shares)):
        last = int(np.searchsorted(ends, ends[first] + _SHARE - 1e-9))
        if last <= len(shares) and last - first < best[1] - best[0]:
            best = (first, last)
    return best
