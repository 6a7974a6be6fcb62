import numpy as np
import torch

from detector.batches import batches, to_pixels, to_tensor


def test_all_256_levels_survive_the_way_there_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)

    tensor = to_tensor(pixels, torch.device("cpu"))

    assert (tensor.shape, tensor.min(), tensor.max()) == ((1, 1, 16, 16), 0, 1)
    assert np.array_equal(to_pixels(tensor), pixels)


def test_channels_come_first_and_go_last():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)

    tensor = to_tensor(pixels, torch.device("cpu"))

    assert torch.equal(tensor[1, 2], torch.from_numpy(pixels[1, :, :, 2]).float() / 255)
    assert np.array_equal(to_pixels(tensor), pixels)


def test_batches_cover_every_image_once_in_order(digits):
    images = digits.validation
    seen = [(positions, pixels) for positions, pixels in batches(images, 33, torch.device("cpu"))]

    together = np.concatenate([to_pixels(pixels) for _, pixels in seen])
    assert np.array_equal(together, images.pixels(slice(None)))
    assert seen[-1][0].stop == len(images)
