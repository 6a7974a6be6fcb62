"""VGGNet for small images: sixteen 3x3 convolutions with batch normalisation.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, configuration E; as usual for CIFAR one
linear layer takes the place of the three.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from detector.network.normalise import Normalise

# Filters of each convolution; the images are halved after each group.
GROUPS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class VggNet(nn.Module):
    """Five groups of convolutions, each but the last followed by 2x2 max pooling, then the mean over the image."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.normalise = Normalise(channels)
        self.features = nn.Sequential(*_layers(channels))
        self.linear = nn.Linear(GROUPS[-1][-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], `(batch, channels, height, width)`, sides from 16 on -> logits `(batch, classes)`."""
        logits: Tensor = self.linear(self.features(self.normalise(images)).mean(dim=(2, 3)))
        return logits


def _layers(channels: int) -> Iterator[nn.Module]:
    for index, group in enumerate(GROUPS):
        for filters in group:
            yield nn.Conv2d(channels, filters, 3, padding=1, bias=False)
            yield nn.BatchNorm2d(filters)
            yield nn.ReLU()
            channels = filters
        if index < len(GROUPS) - 1:
            yield nn.MaxPool2d(2)
