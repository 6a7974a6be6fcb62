"""The first layer of every network: pixels in [0, 1] to zero mean and unit variance."""

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Pixels in [0, 1] -> zero mean and unit variance per channel."""

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
