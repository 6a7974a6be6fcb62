import pytest
import torch
from torch import nn

from detector.network.decouple import decouple
from detector.network.folding import fold_normalisation
from detector.network.networks import build_network


@pytest.mark.parametrize("normalised", [True, False])
def test_a_folded_network_gives_the_same_logits_and_paths(normalised):
    network = decouple(build_network("resnet20", 3, 10), normalised=normalised).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, 3, 16, 16))  # gives the normalisations statistics of their own
    network.eval()
    images = torch.rand(4, 3, 16, 16)

    with torch.inference_mode():
        logits, readings = network.trace(images)
        folded_logits, folded_readings = fold_normalisation(network).trace(images)

    torch.testing.assert_close(folded_logits, logits, atol=1e-4, rtol=1e-4)
    for name, reading in readings.items():
        sure = reading.logits.abs() > 1e-4
        assert torch.equal(folded_readings[name].mask[sure], reading.mask[sure])


def test_nothing_is_left_to_normalise_and_the_original_is_untouched():
    network = decouple(build_network("resnet8", 1, 10)).eval()

    folded = fold_normalisation(network)

    def normalisations(module):
        return [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]

    assert normalisations(folded) == []
    assert len(normalisations(network)) == 13
    assert folded.layers == network.layers


class Shared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.shared = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.other = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
        self.own = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())

    def forward(self, images):
        out = torch.relu(self.stem(images))
        return self.own(self.one(self.shared(out)) + self.other(self.shared(out))).mean(dim=(2, 3))


def test_a_convolution_with_two_normalisations_is_left_as_it_is():
    backbone = Shared().eval()
    backbone.other.running_mean += 3
    network = decouple(backbone)
    images = torch.rand(2, 1, 8, 8)

    torch.testing.assert_close(fold_normalisation(network)(images), network(images))
