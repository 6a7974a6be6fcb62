"""The published backbones, by name, for any image channels and any number of classes."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.errors import RequestError


class Normalise(nn.Module):
    """Pixels in [0, 1] -> zero mean and unit variance per channel: the first layer of every network."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((1, channels, 1, 1), 0.25))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take the mean and standard deviation of the training pixels, each `(channels,)`, in [0, 1]."""
        self.mean.copy_(mean.reshape(self.mean.shape))
        self.std.copy_(std.clamp_min(1e-3).reshape(self.std.shape))

    def forward(self, images: Tensor) -> Tensor:
        """`(batch, channels, height, width)` -> the same shape."""
        return (images - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = channels - in_channels

    def forward(self, features: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` -> `(batch, channels, h / stride, w / stride)`."""
        out = F.relu(self.bn1(self.conv1(features)))
        out = self.bn2(self.conv2(out))
        shortcut = features
        if self.stride != 1 or self.padding != 0:
            shortcut = F.pad(
                features[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, self.padding // 2, self.padding - self.padding // 2),
            )
        return F.relu(out + shortcut)


class ResNet(nn.Module):
    """The CIFAR family of He et al. 2016: depth 6n + 2, three stages of 16, 32 and 64 filters."""

    def __init__(self, depth: int, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise RequestError(f"expected a depth of 6n + 2 from 8 on, got {depth}")
        blocks = (depth - 2) // 6
        self.normalise = Normalise(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], `(batch, channels, height, width)` -> logits `(batch, classes)`."""
        out = F.relu(self.bn1(self.conv1(self.normalise(images))))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


NETWORKS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "resnet8": lambda channels, classes: ResNet(8, channels, classes),
    "resnet14": lambda channels, classes: ResNet(14, channels, classes),
    "resnet20": lambda channels, classes: ResNet(20, channels, classes),
    "resnet56": lambda channels, classes: ResNet(56, channels, classes),
}


def build_network(name: str, channels: int, classes: int) -> nn.Module:
    """A network of `NETWORKS` with fresh weights.

    Raises:
        RequestError: the name is unknown, or there are fewer than 2 classes or no channels.
    """
    if name not in NETWORKS:
        raise RequestError(f"expected a network of {', '.join(sorted(NETWORKS))}; got {name!r}")
    if channels < 1 or classes < 2:
        raise RequestError(f"expected at least 1 channel and 2 classes, got {channels} and {classes}")
    return NETWORKS[name](channels, classes)
