"""`uint8` pixels with channels last <-> float tensors in [0, 1] with channels first, on the device of a network."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from detector.datasets import ImageSet
from detector.images import Pixels


def to_tensor(pixels: Pixels, device: torch.device) -> Tensor:
    """`uint8` `(images, height, width, channels)` -> float in [0, 1], `(images, channels, height, width)`."""
    return scaled(torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device))


def scaled(pixels: Tensor) -> Tensor:
    """The same of a tensor, where it lies."""
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)


def to_pixels(images: Tensor) -> Pixels:
    """Float in [0, 1], `(images, channels, height, width)` -> the nearest `uint8` pixels, channels last."""
    rounded = images.detach().mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def batches(images: ImageSet, batch: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """The positions of each batch of `images`, and its pixels as a tensor; one batch in memory at a time."""
    for start in range(0, len(images), batch):
        positions = slice(start, min(start + batch, len(images)))
        yield positions, to_tensor(images.pixels(positions), device)


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU.

    From then on a GPU convolves in full float32. By default cuDNN rounds what it multiplies to TensorFloat-32, whose 10
    bits of fraction move gate logits by more than 1e-4: paths, and with them scores, would not be those of a CPU. Where
    training takes bfloat16 it stays as fast as it was.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


def device_of(network: nn.Module) -> torch.device:
    """Where the weights of `network` lie."""
    return next(network.parameters()).device
