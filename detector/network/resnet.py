"""Residual networks for small and for large images (He et al., "Deep Residual Learning", CVPR 2016)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.errors import RequestError
from detector.network.normalise import Normalise


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: without parameters (option A) or a 1x1 projection (option B)."""

    def __init__(self, in_channels: int, channels: int, stride: int, projected: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = channels - in_channels
        self.downsample: nn.Module | None = None
        if projected and (stride != 1 or self.padding != 0):
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` -> `(batch, channels, h / stride, w / stride)`."""
        out = F.relu(self.bn1(self.conv1(features)))
        out = self.bn2(self.conv2(out))
        shortcut = features
        if self.downsample is not None:
            shortcut = self.downsample(features)
        elif self.stride != 1 or self.padding != 0:
            shortcut = F.pad(
                features[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, self.padding // 2, self.padding - self.padding // 2),
            )
        return F.relu(out + shortcut)


class SmallResNet(nn.Module):
    """The CIFAR family: depth 6n + 2, three stages of 16, 32 and 64 filters, option A."""

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


class ResNet18(nn.Module):
    """The network for images of about 224 x 224; its weights have the names that torchvision gives them."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.normalise = Normalise(channels)
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(64, 64, 2, stride=1, projected=True)
        self.layer2 = _stage(64, 128, 2, stride=2, projected=True)
        self.layer3 = _stage(128, 256, 2, stride=2, projected=True)
        self.layer4 = _stage(256, 512, 2, stride=2, projected=True)
        self.fc = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], `(batch, channels, height, width)` -> logits `(batch, classes)`."""
        out = self.maxpool(F.relu(self.bn1(self.conv1(self.normalise(images)))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.fc(torch.flatten(out.mean(dim=(2, 3)), 1))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int, projected: bool = False) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, projected)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
