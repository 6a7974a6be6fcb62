"""The published backbones, by name, for any image channels and any number of classes."""

from collections.abc import Callable, Mapping

from torch import nn

from detector.errors import RequestError
from detector.googlenet import GoogLeNet
from detector.resnet import ResNet18, SmallResNet
from detector.vgg import VggNet

NETWORKS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "resnet8": lambda channels, classes: SmallResNet(8, channels, classes),
    "resnet14": lambda channels, classes: SmallResNet(14, channels, classes),
    "resnet20": lambda channels, classes: SmallResNet(20, channels, classes),
    "resnet56": lambda channels, classes: SmallResNet(56, channels, classes),
    "vggnet": VggNet,
    "googlenet": GoogLeNet,
    "resnet18": ResNet18,
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
