"""The static peer: a residual network whose blocks have lost filters for good, the same for all images.

Which ones is decided by their L1 norm, by torch's own tool (Li et al., "Pruning Filters for Efficient ConvNets", ICLR
2017): in each block those of the first convolution, which nothing but the second one reads. They are cut from the
weights, so that the network is smaller and faster in every engine.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from detector.network.resnet import BasicBlock


def pruned(network: nn.Module, keep: float) -> nn.Module:
    """A copy of a residual network that keeps this share, in (0, 1], of the first filters of each block."""
    smaller = copy.deepcopy(network)
    for _, block in _blocks(smaller):
        filters = block.conv1.out_channels
        prune.ln_structured(block.conv1, "weight", filters - max(1, round(keep * filters)), n=1, dim=0)
        kept = block.conv1.get_buffer("weight_mask").flatten(1).any(dim=1).nonzero().flatten()
        prune.remove(block.conv1, "weight")
        _cut(block, kept)
    return smaller


def like(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a residual network, cut to the shapes of a pruned one's weights, which it takes over."""
    smaller = copy.deepcopy(network)
    for name, block in _blocks(smaller):
        _cut(block, torch.arange(len(weights[f"{name}.conv1.weight"])))
    smaller.load_state_dict(weights)
    return smaller


def macs(network: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of all convolutions and linear layers for one image, `(1, channels, height, width)`."""
    counted: list[int] = []

    def note(module: nn.Module, _inputs: object, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        places = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        counted.append(module.weight.numel() * places)

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.inference_mode():
        network(image)
    for hook in hooks:
        hook.remove()
    return sum(counted)


def _blocks(network: nn.Module) -> list[tuple[str, BasicBlock]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, BasicBlock)]


def _cut(block: BasicBlock, kept: Tensor) -> None:
    """Leave the filters `kept`, numbers in ascending order, and what reads them."""
    for module, names, axis in (
        (block.conv1, ("weight",), 0),
        (block.bn1, ("weight", "bias", "running_mean", "running_var"), 0),
        (block.conv2, ("weight",), 1),
    ):
        for name in names:
            tensor = getattr(module, name)
            tensor.data = tensor.data.index_select(axis, kept.to(tensor.device)).clone()
    block.conv1.out_channels = block.bn1.num_features = block.conv2.in_channels = len(kept)
