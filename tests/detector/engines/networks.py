"""Small networks with settled statistics, and the engines to hold against each other on them."""

import torch
from hypothesis import strategies as st
from torch import nn

from detector.network.decouple import GatedNet, decouple


class Sum(nn.Module):
    """What a block says, added to its input, through a ReLU."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, features):
        return torch.relu(self.block(features) + features)


class Fork(nn.Module):
    """Two branches side by side."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, features):
        return torch.cat([self.one(features), self.other(features)], dim=1)


def convolution(inputs, outputs, kernel=3, stride=1, padding=None, relu=True):
    padding = kernel // 2 if padding is None else padding
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


def settled(backbone, images, keep=0.5) -> GatedNet:
    """`backbone` decoupled, with the statistics of `images` and weights that make gates depend on them."""
    return settle(decouple(backbone, keep), images)


def settle(network, images) -> GatedNet:
    """`network`, likewise."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        if norm is not None and isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, 0.0, 0.3)
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        network(images)
    return network.eval()


@st.composite
def backbones(draw, channels):
    """Convolutions of all kinds, residual blocks, branches and pooling, then one linear map."""
    width = draw(st.integers(1, 9))
    layers = [convolution(channels, width)]
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("plain", "sum", "fork", "max", "mean", "bare")))
        if kind == "plain":
            after = draw(st.integers(1, 20))
            kernel, stride = draw(st.sampled_from(((1, 1), (3, 1), (3, 2), (1, 2), (5, 1), (5, 2), (2, 1), (7, 3))))
            padding = draw(st.integers(kernel // 2, kernel // 2 + 1))
            layers.append(convolution(width, after, kernel, stride, padding, relu=draw(st.booleans())))
            width = after
        elif kind == "sum":
            inner = draw(st.integers(1, 14))
            layers.append(Sum(nn.Sequential(convolution(width, inner), convolution(inner, width, relu=False))))
        elif kind == "fork":
            one, other = draw(st.integers(1, 8)), draw(st.integers(1, 8))
            layers.append(Fork(convolution(width, one, 1), convolution(width, other)))
            width = one + other
        elif kind == "max":
            layers.append(nn.MaxPool2d(3, 2, 1))
        elif kind == "mean":
            layers.append(nn.AvgPool2d(3, 2, 1, count_include_pad=draw(st.booleans())))
        else:
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(convolution(width, width + 1))
    head = draw(st.sampled_from(("pooled", "whole")))
    if head == "pooled":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width + 1, 5)]
    else:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width + 1, 6), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers)
