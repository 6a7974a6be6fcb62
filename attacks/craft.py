"""One recipe on one batch of images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from attacks.recipes import Recipe
from detector.batches import to_pixels, to_tensor
from detector.errors import RequestError
from detector.images import Pixels


@dataclass(frozen=True, slots=True)
class Crafted:
    """Attacked images, rounded to 8 bits, and what became of them.

    Attributes:
        pixels: `uint8`, `(images, height, width, channels)`.
        predicted: the network's label for them, `int64`, `(images,)`.
        fooled: whether that label is wrong, `(images,)`; measured after rounding.
        linf: largest change of a pixel, in [0, 1], `float32`, `(images,)`.
        l2: Euclidean length of the change, pixels in [0, 1], `float32`, `(images,)`.
        l1: sum of the changes, pixels in [0, 1], `float32`, `(images,)`.
        l0: number of changed values, `float32`, `(images,)`.
    """

    pixels: Pixels
    predicted: npt.NDArray[np.int64]
    fooled: npt.NDArray[np.bool_]
    linf: npt.NDArray[np.float32]
    l2: npt.NDArray[np.float32]
    l1: npt.NDArray[np.float32]
    l0: npt.NDArray[np.float32]


def craft(recipe: Recipe, network: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Crafted:
    """Attack `images`, which `network` gets right.

    Gradients pass the gates of a decoupled network straight through; its mode and the need for gradients of its
    weights are as before when this returns or raises.

    Args:
        recipe: the attack.
        network: images -> logits.
        images: in [0, 1], `(batch, channels, height, width)`.
        labels: the right labels, `(batch,)`.
        seed: of the attack's random draws.

    Raises:
        RequestError: an image is not finite or leaves [0, 1], or a label is none of the network's classes.
    """
    images, labels = images.detach().contiguous(), labels.detach()
    if not torch.isfinite(images).all() or images.min() < 0 or images.max() > 1:
        raise RequestError(f"expected pixels in [0, 1], got {images.min().item():g} to {images.max().item():g}")
    with _as_an_attacker_sees(network):
        with torch.no_grad():
            classes = network(images[:1]).shape[1]
        if labels.min() < 0 or labels.max() >= classes:
            raise RequestError(f"expected labels from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            attacked = recipe.against(network)(images, labels)
        pixels = to_pixels(attacked)
        rounded = to_tensor(pixels, images.device)
        with torch.no_grad():
            predicted = network(rounded).argmax(dim=1)
    change = (rounded - images).flatten(1)
    return Crafted(
        pixels=pixels,
        predicted=predicted.cpu().numpy(),
        fooled=(predicted != labels).cpu().numpy(),
        linf=change.abs().amax(dim=1).cpu().numpy(),
        l2=change.norm(dim=1).cpu().numpy(),
        l1=change.abs().sum(dim=1).cpu().numpy(),
        l0=(change.abs() > 0.5 / 255).sum(dim=1).float().cpu().numpy(),
    )


@contextmanager
def _as_an_attacker_sees(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode with fixed weights; everything as before afterwards, also after an error."""
    modes = [(module, module.training) for module in network.modules()]
    wanting = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.eval()
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
