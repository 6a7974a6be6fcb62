import pytest
import torch

from detector.interpretation.concepts import Combination
from detector.interpretation.regions import find_regions
from detector.network.decouple import GatedNet, decouple
from detector.network.networks import build_network


@pytest.fixture
def network() -> GatedNet:
    made = decouple(build_network("resnet8", 1, 10), 0.7)
    for gate in made.gates():  # all open, whatever the image
        gate.excite.weight.data.zero_()
        gate.normalise.bias.data.fill_(1.0)
    return made.eval()


def square_at(top: int, left: int) -> torch.Tensor:
    image = torch.zeros(1, 1, 32, 32)
    image[:, :, top : top + 4, left : left + 4] = 1.0
    return image


@pytest.mark.parametrize(("top", "left"), [(4, 6), (20, 22), (4, 22)])
def test_the_region_is_where_the_image_has_something_to_see(network, top, left):
    (region,) = find_regions(network, square_at(top, left), Combination((2, 5), 0))
    assert region.top <= top + 4
    assert region.top + region.height >= top
    assert region.left <= left + 4
    assert region.left + region.width >= left
    assert region.height <= 16
    assert region.width <= 16


def test_each_image_has_its_own_region_and_lies_within_it(network):
    images = torch.cat([square_at(4, 4), square_at(22, 22)])
    first, second = find_regions(network, images, Combination((2, 5, 20), 0))
    assert first.top < second.top
    assert first.left < second.left
    for region in (first, second):
        assert 0 <= region.top < region.top + region.height <= 32
        assert 0 <= region.left < region.left + region.width <= 32


def test_an_image_of_one_grey_has_a_region_too(network):
    (region,) = find_regions(network, torch.zeros(1, 1, 32, 32), Combination((2,), 0))
    assert region.height >= 1
    assert region.width >= 1
