"""The published CIFAR-10 backbones of akamaster/pytorch_resnet_cifar10, as this project's own networks.

Their weights (He et al. 2016, option-A shortcuts) carry the same names as `detector.network.resnet.SmallResNet` behind
a prefix, so that nothing is mapped but the prefix; the normalisation, which their authors keep outside the network,
becomes its first layer. Attacks on them can be compared with other libraries'; they saw all 50,000 training images,
so that no detector is published on them.
"""

import pickle
import re
from pathlib import Path

import torch
from torch import nn

from attacks.selection import rightly_classified
from detector.datasets import ImageSet, load_splits
from detector.errors import ArtifactError, DataError
from detector.network.resnet import SmallResNet

PREFIX = "module."
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_published(file: Path) -> nn.Module:
    """The network of a published weights file, in evaluation mode: images in [0, 1] -> logits of 10 classes.

    Args:
        file: for example `resnet20-12fca82f.th`; its depth is read from its layers.

    Raises:
        ArtifactError: not such a file.
    """
    try:
        # weights_only: the file is a pickle, and this reads tensors from it and runs nothing.
        content = torch.load(file, map_location="cpu", weights_only=True)
        weights = {name.removeprefix(PREFIX): values for name, values in content["state_dict"].items()}
    except (OSError, pickle.UnpicklingError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"expected published ResNet weights in {file}, got {_one_line(error)}") from None
    blocks = {match[1] for name in weights if (match := re.match(r"layer1\.(\d+)\.conv1\.weight", name))}
    network = SmallResNet(6 * max(len(blocks), 1) + 2, 3, 10)
    network.normalise.set_statistics(torch.tensor(MEAN), torch.tensor(STD))
    # Ours alone: the normalisation, and batch normalisation's counters, which their version of torch did not have.
    own = ("normalise.mean", "normalise.std", "num_batches_tracked")
    ours = {name: values for name, values in network.state_dict().items() if name.endswith(own)}
    try:
        network.load_state_dict({**ours, **weights})
    except RuntimeError as error:
        raise ArtifactError(f"expected the layers of an option-A ResNet in {file}, got {_one_line(error)}") from None
    return network.eval()


def right_images(network: nn.Module, data_dir: Path | None, count: int) -> ImageSet:
    """The first `count` CIFAR-10 images of the fitting split that `network` gets right.

    The fitting split, because comparing attacks is trying things: the test split is for published detection figures.

    Raises:
        DataError: the images cannot be had, or there are fewer.
    """
    fitting = load_splits("cifar10", data_dir).fitting
    # A tenth more than can be wrong at 91.7 %, so that not all 4,000 images are looked at for 100.
    looked_at = fitting.first(count + count // 5 + 50)
    found = looked_at.subset(rightly_classified(network, looked_at)).first(count)
    if len(found) < count:
        raise DataError(f"expected {count} images that the network gets right, got {len(found)} of {len(looked_at)}")
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
