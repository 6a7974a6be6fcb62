import torch

from benchmarks.masks import RandomMask, StaticMask, put_masks
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.paths.encoder import encode


def test_a_static_mask_opens_the_filters_of_largest_scale_for_every_image():
    mask = StaticMask(torch.tensor([0.1, -3.0, 2.0, 0.5]), 0.5)
    output = torch.rand(3, 4, 2, 2)

    masked, reading = mask(torch.rand(3, 5, 2, 2), output)

    assert reading.mask.tolist() == [[0, 1, 1, 0]] * 3
    assert torch.equal(masked[:, 1:3], output[:, 1:3])
    assert (masked[:, [0, 3]] == 0).all()


def test_a_random_mask_opens_as_many_for_each_image_and_the_same_again_for_the_same_image():
    mask, features = RandomMask(10, 0.7), torch.rand(20, 5, 2, 2)

    _, reading = mask(features, torch.rand(20, 10, 2, 2))
    _, alone = mask(features[4:5], torch.rand(1, 10, 2, 2))

    assert (reading.mask.sum(dim=1) == 7).all()
    assert len({tuple(row) for row in reading.mask.tolist()}) > 5
    assert torch.equal(alone.mask[0], reading.mask[4])


def test_masks_take_the_place_of_all_gates():
    network = decouple(build_network("resnet8", 1, 10))
    put_masks(network, [RandomMask(width, 0.5) for width in network.layers.values()])

    evidence = encode(network.eval(), torch.rand(4, 1, 12, 12))

    assert evidence.path.bits.mean() == 0.5
