import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detector.errors import RequestError
from detector.network.decouple import decouple
from detector.network.folding import fold_normalisation
from detector.network.macs import cost_of
from detector.network.named_gates import normalised_convolutions
from detector.network.networks import build_network
from detector.paths.encoder import encode
from detector.paths.path_encoding import PathEncoding


class Untraceable(nn.Module):
    """Its second half depends on the image's values, which torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=4), nn.BatchNorm2d(12))
        self.shared = nn.Conv2d(12, 12, 1)
        self.shared_norm = nn.BatchNorm2d(12)
        self.bare = nn.Conv2d(12, 6, 1)
        self.last = nn.Sequential(nn.Conv2d(6, 10, 1), nn.BatchNorm2d(10), nn.ReLU())
        self.linear = nn.Linear(10, 3)

    def forward(self, images: Tensor) -> Tensor:
        out = self.grouped(self.block(self.stem(images)))
        for _ in range(2 if images.mean() >= 0 else 1):
            out = self.shared_norm(self.shared(out))
        return self.linear(self.last(self.bare(out)).mean(dim=(2, 3)))


@pytest.fixture
def example():
    return torch.rand(2, 1, 8, 8)


def open_all(network):
    for gate in network.gates():
        nn.init.zeros_(gate.normalise.weight)
        nn.init.constant_(gate.normalise.bias, 5.0)
    return network.eval()


def test_the_rule_is_that_of_traced_networks(example):
    network = Untraceable().train()

    pairs = normalised_convolutions(network, example)

    assert pairs == {"block.0": "block.1", "last.0": "last.1"}  # no stem, no grouped, none called twice, none bare
    assert network.training


def test_with_all_gates_open_the_output_is_the_backbones(example):
    backbone = Untraceable().eval()
    network = open_all(decouple(backbone, 0.7, patterns=["*"], example=example))

    torch.testing.assert_close(network(example), backbone(example))
    assert network.layers == {"block.0": 12, "last.0": 10}


def test_closed_filters_are_exactly_zero_and_every_gate_is_read(example):
    network = decouple(Untraceable(), 0.5, patterns=["*"], example=example).eval()
    seen = {}
    network.graph.backbone.block[1].register_forward_hook(lambda *args: seen.update(before=args[2].clone()))
    network.graph.backbone.block[2].register_forward_hook(lambda *args: seen.update(after=args[2].clone()))

    with torch.no_grad():
        logits, readings = network.trace(example)

    closed = readings["block.0"].mask == 0
    assert closed.any()
    assert (seen["after"][closed] == 0).all()
    assert torch.equal(logits, network(example))


def test_it_learns_and_is_counted_folded_and_encoded_like_a_traced_one(example):
    network = decouple(Untraceable(), 0.7, patterns=["*"], example=example).train()
    network(example).sum().backward()
    assert all(gate.excite.weight.grad.abs().sum() > 0 for gate in network.gates())
    network.eval()

    cost = cost_of(network, example[:1])
    closed = {name: np.zeros((1, width), np.bool_) for name, width in network.layers.items()}
    pixels = 64
    assert (
        cost.of(PathEncoding.side_by_side(closed))[0] == cost.dense + cost.gates - pixels * 9 * 8 * 12 - pixels * 6 * 10
    )
    folded = fold_normalisation(network)
    torch.testing.assert_close(folded(example), network(example))
    evidence = encode(network, example)
    assert len(evidence) == 2
    assert evidence.inputs.reads == network.reads
    assert evidence.inputs.means.shape == (2, sum(network.reads.values()))


def test_an_untraceable_network_without_names_is_told_how_to_name_them(example):
    with pytest.raises(RequestError, match=r"expected a network that torch.fx can trace, or names of .* got Untrace"):
        decouple(Untraceable(), 0.7, example=example)


def test_patterns_that_name_nothing_are_refused(example):
    with pytest.raises(RequestError, match=r"named like head\*; got none in Untraceable"):
        decouple(Untraceable(), 0.7, patterns=["head*"], example=example)
    with pytest.raises(RequestError, match=r"named like head\*; got none in SmallResNet"):
        decouple(build_network("resnet8", 1, 3), 0.7, patterns=["head*"])


class Fork(nn.Module):
    """Bright images take one branch, dark ones the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.bright = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.dark = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.linear = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        out = self.stem(images)
        out = self.bright(out) if images.mean() > 0.5 else self.dark(out)
        return self.linear(out.mean(dim=(2, 3)))


def test_a_gated_convolution_that_does_not_run_is_named():
    network = decouple(Fork(), 0.7, patterns=["*"], example=torch.ones(1, 1, 8, 8))

    assert network(torch.ones(2, 1, 8, 8)).shape == (2, 2)
    with pytest.raises(RequestError, match=r"the gated convolution bright.0 to run once .* it ran not at all"):
        network(torch.zeros(2, 1, 8, 8))


def test_both_ways_gate_the_same_convolutions_of_a_network_that_can_be_traced(example):
    backbone = build_network("resnet8", 1, 3).eval()

    assert list(normalised_convolutions(backbone, example)) == list(decouple(backbone).layers)
