import numpy as np
import pytest
import torch
from torch import nn

from detector.network.decouple import decouple
from detector.network.macs import cost_of
from detector.network.networks import build_network
from detector.paths.encoder import encode
from detector.paths.path_encoding import PathEncoding


def path_of(network, share):
    """A path on which the first `share` of each layer's filters is open."""
    return PathEncoding.side_by_side(
        {name: (np.arange(width) < round(share * width))[None] for name, width in network.layers.items()}
    )


def test_a_small_network_counted_by_hand():
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    network = decouple(backbone).eval()
    bits = {"3": np.arange(8)[None] < 3, "7": np.arange(8)[None] < 2}

    cost = cost_of(network, torch.rand(1, 3, 6, 6))

    stem, head, gates = 36 * 9 * 3 * 4, 8 * 5, (4 * 1 + 1 * 8) + (8 * 2 + 2 * 8)
    assert cost.dense == stem + 36 * 9 * 4 * 8 + 9 * 8 * 8 + head
    assert cost.gates == gates
    assert cost.of(PathEncoding.side_by_side(bits)).tolist() == [stem + 36 * 9 * 4 * 3 + 9 * 3 * 2 + head + gates]


@pytest.mark.parametrize(
    ("name", "size", "dense", "at_seven_tenths", "at_half"),
    [
        ("resnet20", 32, 40.55e6, -0.406, -0.625),
        ("resnet56", 32, 125.5e6, -0.405, -0.625),
        ("vggnet", 32, 398e6, -0.485, -0.720),
        ("googlenet", 32, 1522e6, -0.500, -0.738),
        ("resnet18", 224, 1814e6, -0.387, -0.594),
    ],
)
def test_the_published_networks_cost_what_is_known_of_them(name, size, dense, at_seven_tenths, at_half):
    network = decouple(build_network(name, 3, 1000 if size == 224 else 10)).eval()

    cost = cost_of(network, torch.rand(1, 3, size, size))

    assert cost.dense == pytest.approx(dense, rel=2e-3)
    assert cost.of(path_of(network, 0.7))[0] / cost.dense - 1 == pytest.approx(
        at_seven_tenths, abs=0.01
    )  # 11 of 16 filters
    assert cost.of(path_of(network, 0.5))[0] / cost.dense - 1 == pytest.approx(at_half, abs=0.002)
    assert 0 < cost.gates / cost.dense < 0.003


def test_an_open_path_costs_the_backbone_and_its_gates_and_each_image_its_own():
    network = decouple(build_network("resnet8", 1, 10)).eval()
    images = torch.rand(5, 1, 16, 16)
    cost = cost_of(network, images[:1])

    each = cost.of(encode(network, images).path)

    assert cost.of(path_of(network, 1.0))[0] == cost.dense + cost.gates
    assert each.shape == (5,)
    assert (each < cost.dense).all()


class Side(nn.Module):
    """Two gated branches joined along `dim`, a convolution that runs twice, and a head for each place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.stem = nn.Conv2d(1, 2, 1)
        self.one = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.after = nn.Conv2d(8 if dim == 1 else 4, 3, 1)
        self.twice = nn.Conv2d(3, 3, 1)
        self.linear = nn.Linear(3, 5)

    def forward(self, images):
        out = self.stem(images)
        out = self.after(torch.cat([self.one(out), self.two(out)], dim=self.dim))
        return self.linear(self.twice(self.twice(out)).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("dim", [1, 2])
def test_joined_branches_repeated_convolutions_and_heads_for_each_place_are_counted_by_hand(dim):
    network = decouple(Side(dim))
    pixels, joined = 16, 16 if dim == 1 else 32
    inner = pixels * 2 * 4

    cost = cost_of(network, torch.rand(1, 1, 4, 4))
    closed = PathEncoding.side_by_side({name: np.zeros((1, width), np.bool_) for name, width in network.layers.items()})

    after = joined * (8 if dim == 1 else 4) * 3
    assert cost.dense == pixels * 2 + 2 * inner + after + joined * (2 * 3 * 3 + 3 * 5)
    # Joined by channels, what is closed need not be read; joined by rows, every channel may be open in some row.
    saved = 2 * inner + (after if dim == 1 else 0)
    assert cost.of(closed)[0] == cost.dense + cost.gates - saved
