"""Backbones: the published ones by name, for any image channels and classes, and a user's own by its function."""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from detector.errors import RequestError
from detector.network.googlenet import GoogLeNet
from detector.network.resnet import ResNet18, SmallResNet
from detector.network.vgg import VggNet

NETWORKS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "resnet8": lambda channels, classes: SmallResNet(8, channels, classes),
    "resnet14": lambda channels, classes: SmallResNet(14, channels, classes),
    "resnet20": lambda channels, classes: SmallResNet(20, channels, classes),
    "resnet56": lambda channels, classes: SmallResNet(56, channels, classes),
    "vggnet": VggNet,
    "googlenet": GoogLeNet,
    "resnet18": ResNet18,
}


def build_network(name: str, channels: int, classes: int, trusted: str | None = None) -> nn.Module:
    """A network with fresh weights.

    Args:
        name: a network of `NETWORKS`, or `package.module:function` for a function of channels and classes that returns
            a module of images in [0, 1], `(batch, channels, height, width)`, to logits `(batch, classes)`.
        channels: of the images.
        classes: how many there are.
        trusted: the `package.module:function` whose code may be run; no other is.

    Raises:
        RequestError: the name is unknown or not trusted, the function cannot be imported or fails, or there are fewer
            than 2 classes or no channels.
    """
    if channels < 1 or classes < 2:
        raise RequestError(f"expected at least 1 channel and 2 classes, got {channels} and {classes}")
    if ":" in name:
        return _built_by_user(name, channels, classes, trusted)
    if name not in NETWORKS:
        raise RequestError(
            f"expected a network of {', '.join(sorted(NETWORKS))}, or package.module:function; got {name!r}"
        )
    return NETWORKS[name](channels, classes)


def _built_by_user(name: str, channels: int, classes: int, trusted: str | None) -> nn.Module:
    if name != trusted:
        raise RequestError(
            f"expected leave to run the code of {name}, which builds this network, got none; give --trust {name} if "
            "you trust it"
        )
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does: a command's own folder is not where its user stands
        sys.path.insert(0, here)
    try:
        network = getattr(importlib.import_module(module), function)(channels, classes)
    except Exception as error:  # the user's code may fail in any way
        raise RequestError(
            f"expected a function of channels and classes in {name}, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    if not isinstance(network, nn.Module):
        raise RequestError(f"expected a torch module from {name}, got {type(network).__name__}")
    return network
