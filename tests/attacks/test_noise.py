import pytest
import torch

from attacks.draws import Draws
from attacks.noise import noise_of, with_noise
from attacks.problem import rounded


def images_and_noise(count=6, shape=(3, 32, 32)):
    return rounded(torch.rand(count, *shape)), torch.randn(count, *shape)


def length(change):
    return change.flatten(1).norm(dim=1)


@pytest.mark.parametrize("wanted", [0.05, 0.1, 0.3, 0.5, 2.0, 10.0])
def test_noise_is_as_long_as_wanted_after_rounding(wanted):
    images, noise = images_and_noise()

    noisy = with_noise(images, noise, torch.full((6,), wanted))

    assert torch.equal(noisy, rounded(noisy))
    # One value more that moves by one level is the finest step there is.
    finest = ((wanted * 255) ** 2 + 1) ** 0.5 / 255 - wanted
    assert torch.allclose(length(noisy - images), torch.full((6,), wanted), atol=finest, rtol=0.01)


def test_each_image_has_its_own_length_and_none_where_none_is_wanted():
    images, noise = images_and_noise()
    wanted = torch.tensor([0.0, 0.2, 0.4, 0.8, 1.6, 3.2])

    noisy = with_noise(images, noise, wanted)

    assert torch.equal(noisy[0], images[0])
    assert torch.allclose(length(noisy - images), wanted, rtol=0.01)


def test_noise_points_where_it_was_drawn():
    images, noise = torch.full((1, 3, 32, 32), 128 / 255), torch.randn(1, 3, 32, 32)

    change = with_noise(images, noise, torch.tensor([3.0])) - images

    assert torch.cosine_similarity(change.flatten(), noise.flatten(), dim=0) > 0.99


def test_noise_points_nowhere_near_the_random_start_of_an_attack_on_the_same_image():
    images, seeds, rows = torch.zeros(20, 3, 32, 32), list(range(20)), torch.arange(20)
    noise = noise_of(images, seeds).flatten(1)

    for draw in (lambda draws: draws.normal(rows, 3, 32, 32), lambda draws: draws.uniform(rows, 3, 32, 32, low=-1)):
        start = draw(Draws(seeds, images.device, images.dtype)).flatten(1)
        assert torch.cosine_similarity(noise, start, dim=1).abs().max() < 0.1
    assert torch.equal(noise_of(images[3:4], [3]).flatten(1), noise[3:4])


def test_an_image_that_the_noise_cannot_change_comes_back():
    assert torch.equal(with_noise(torch.zeros(1, 1, 4, 4), -torch.ones(1, 1, 4, 4), torch.tensor([1.0])).sum(),
                       torch.tensor(0.0))  # fmt: skip
