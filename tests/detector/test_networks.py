import pytest
import torch

from detector.errors import RequestError
from detector.networks import NETWORKS, Normalise, build_network


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "resnet56"])
def test_any_channels_and_classes_and_sizes(name):
    network = build_network(name, 2, 7).eval()

    assert network(torch.rand(3, 2, 20, 12)).shape == (3, 7)


def test_an_unknown_network_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match="expected a network of resnet14, resnet20, resnet56, resnet8; got 'lenet'"):
        build_network("lenet", 3, 10)


def test_fewer_than_two_classes_are_refused():
    with pytest.raises(RequestError, match="2 classes, got 3 and 1"):
        build_network("resnet8", 3, 1)


def test_normalised_pixels_have_the_statistics_that_were_set():
    layer = Normalise(2)
    layer.set_statistics(torch.tensor([0.2, 0.4]), torch.tensor([0.1, 0.2]))

    result = layer(torch.tensor([0.3, 0.8]).reshape(1, 2, 1, 1))

    torch.testing.assert_close(result.flatten(), torch.tensor([1.0, 2.0]))
