"""GoogLeNet for small images: nine inceptions of four branches.

Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, table 1; as usual for CIFAR the stem is one 3x3
convolution, each 5x5 convolution is two of 3x3, and all are batch-normalised.
"""

import torch
from torch import Tensor, nn

from detector.network.normalise import Normalise

# 1x1; 1x1 before 3x3, 3x3; 1x1 before "5x5", "5x5"; 1x1 behind the pooling. None halves the image.
INCEPTIONS = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    None,
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    None,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)


class Inception(nn.Module):
    """Four branches over the same input, side by side."""

    def __init__(
        self, in_channels: int, one: int, before_three: int, three: int, before_five: int, five: int, pooled: int
    ) -> None:
        super().__init__()
        self.one = _convolution(in_channels, one, 1)
        self.three = nn.Sequential(_convolution(in_channels, before_three, 1), _convolution(before_three, three, 3))
        self.five = nn.Sequential(
            _convolution(in_channels, before_five, 1), _convolution(before_five, five, 3), _convolution(five, five, 3)
        )
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), _convolution(in_channels, pooled, 1))

    def forward(self, features: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` -> `(batch, sum of the branches' filters, h, w)`."""
        return torch.cat([self.one(features), self.three(features), self.five(features), self.pooled(features)], dim=1)


class GoogLeNet(nn.Module):
    """A stem, nine inceptions in three sizes, the mean over the image and one linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.normalise = Normalise(channels)
        self.stem = _convolution(channels, 192, 3)
        stages: list[nn.Module] = []
        width = 192
        for filters in INCEPTIONS:
            if filters is None:
                stages.append(nn.MaxPool2d(3, 2, 1))
                continue
            stages.append(Inception(width, *filters))
            one, _, three, _, five, pooled = filters
            width = one + three + five + pooled
        self.inceptions = nn.Sequential(*stages)
        self.linear = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], `(batch, channels, height, width)`, sides from 4 on -> logits `(batch, classes)`."""
        logits: Tensor = self.linear(self.inceptions(self.stem(self.normalise(images))).mean(dim=(2, 3)))
        return logits


def _convolution(in_channels: int, filters: int, size: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, filters, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight)
    return nn.Sequential(convolution, nn.BatchNorm2d(filters), nn.ReLU())
