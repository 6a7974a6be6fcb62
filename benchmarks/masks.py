"""Masks to hold gates against: one that is the same for every image, and one that is drawn at random."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from detector.network.decouple import GatedNet
from detector.network.gates import GateReading


class StaticMask(nn.Module):
    """Opens the same filters for every image: those whose normalisation has the largest scale."""

    open: Tensor

    def __init__(self, scales: Tensor, keep: float) -> None:
        super().__init__()
        count = max(1, round(keep * len(scales)))
        chosen = torch.zeros_like(scales)
        chosen[scales.abs().topk(count).indices] = 1.0
        self.register_buffer("open", chosen)

    def forward(self, _features: Tensor, output: Tensor) -> tuple[Tensor, GateReading]:
        """Gate `output`, `(batch, filters, height, width)`."""
        mask = self.open.expand(len(output), -1)
        return output * mask[:, :, None, None].to(output.dtype), GateReading(2 * mask - 1, mask)


class RandomMask(nn.Module):
    """Opens as many filters, chosen for each image at random, with the image itself as the seed."""

    def __init__(self, filters: int, keep: float) -> None:
        super().__init__()
        self.filters = filters
        self.count = max(1, round(keep * filters))

    def forward(self, features: Tensor, output: Tensor) -> tuple[Tensor, GateReading]:
        """Gate `output`, `(batch, filters, height, width)`."""
        rows = []
        for image in features.detach().float().mean(dim=(2, 3)):
            seed = int(image.double().sum().abs().item() * 1e6) % (2**31)
            generator = torch.Generator().manual_seed(seed)
            row = torch.zeros(self.filters)
            row[torch.randperm(self.filters, generator=generator)[: self.count]] = 1.0
            rows.append(row)
        mask = torch.stack(rows).to(output.device)
        return output * mask[:, :, None, None].to(output.dtype), GateReading(2 * mask - 1, mask)


def put_masks(network: GatedNet, masks: Iterable[nn.Module]) -> GatedNet:
    """`network` with `masks` in the place of its gates, in network order."""
    network.graph.gates = nn.ModuleList(masks)
    return network
