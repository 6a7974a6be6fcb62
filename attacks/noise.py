"""Noise as long as an attack's change: negatives that differ from clean images as much as attacked ones do.

A detector that flags these has learnt to see noise, not attacks. Each image gets Gaussian noise of the same Euclidean
length as what an attack did to it, length measured after rounding to 8 bits, as everywhere.

All attacks on an image begin with one seed, so that two of them differ by what they do and not by where they start.
Noise must not: from that seed it would be the random start of PGD-L2 itself, and have a cosine of -0.34 with that of
PGD. So it draws numbers of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.draws import Draws, seed_of
from attacks.problem import Problem, rounded
from detector.errors import RequestError

HALVINGS = 40
OWN = -1  # in the place of an image's index


def noise_of(images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Standard normal numbers that no attack on these images draws, the shape of `images`.

    Args:
        images: `(images, channels, height, width)`.
        seeds: of the attacks on each of them, `(images,)`.
    """
    draws = Draws([seed_of(seed, OWN) for seed in seeds], images.device, images.dtype)
    return draws.normal(torch.arange(len(images), device=images.device), *images.shape[1:])


class MatchedNoise:
    """Gaussian noise of a given L2 length for each image."""

    def __call__(self, problem: Problem) -> Tensor:
        """The images with noise, in [0, 1] and rounded to 8 bits.

        Raises:
            RequestError: the problem gives no lengths.
        """
        if problem.lengths is None:
            raise RequestError("expected lengths to match noise to, got none; attack with the recipe itself first")
        seeds = [problem.draws.of(row).initial_seed() for row in range(len(problem))]
        return with_noise(problem.images, noise_of(problem.images, seeds), problem.lengths)


def with_noise(images: Tensor, noise: Tensor, lengths: Tensor) -> Tensor:
    """`images` plus each one's `noise`, scaled so that what is left of it after clipping and rounding is as long as
    wanted.

    Rounding changes a length, most of all a small one: half a level of noise on each pixel is no change at all, a bit
    more is one level on many. What is left grows with the scale, so that halving finds the scale.

    Args:
        images: in [0, 1] and rounded to 8 bits, `(images, channels, height, width)`.
        noise: any, the same shape.
        lengths: wanted L2 lengths, pixels in [0, 1], `(images,)`.

    Returns:
        Images in [0, 1], rounded to 8 bits; where even the largest scale leaves less (an image of black and white
        under noise that points outwards), the longest there is.
    """

    def noisy(scale: Tensor) -> Tensor:
        return rounded((images + scale[:, None, None, None] * noise).clamp(0, 1))

    def length(scale: Tensor) -> Tensor:
        lengths: Tensor = (noisy(scale) - images).flatten(1).norm(dim=1)
        return lengths

    values = images[0].numel() if len(images) else 1
    low, high = torch.zeros_like(lengths), 4 * lengths / values**0.5 + 2 / 255
    for _ in range(12):
        high = torch.where(length(high) < lengths, 2 * high, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        short = length(middle) < lengths
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    nearer_low = (length(low) - lengths).abs() <= (length(high) - lengths).abs()
    return noisy(torch.where(nearer_low, low, high))
