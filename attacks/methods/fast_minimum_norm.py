"""FMN for L1: steps of full length within a ball that shrinks while they fool and grows while they do not.

Source: Pintor et al., "Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints", 2021. EAD, too, looks
for the smallest L1 change, but has to search for its constant; here every step is a step of one run.
"""

import math

import torch
from torch import Tensor

from attacks.methods.minimum_norm import Best
from attacks.methods.sparse import fewest
from attacks.problem import Problem

# Steps after which the nearest images so far are asked whether they survive rounding.
SETTLED = 25
# Of the largest change: as many halvings as single precision tells apart.
BISECTIONS = 24


class FastMinimumNorm:
    """FMN within the L1 norm; once an image is fooled, its ball follows the length of its best change."""

    def __init__(
        self, steps: int = 100, length: float = 1.0, last_length: float = 0.01, growth: float = 0.05,
        last_growth: float = 0.001,
    ) -> None:  # fmt: skip
        """An L1 attack.

        Args:
            steps: along the gradient, each followed by a projection.
            length: of the first step, L2, pixels in [0, 1].
            last_length: of the last one; between them half a cosine.
            growth: share by which the ball grows or shrinks after the first step.
            last_growth: after the last one; likewise.
        """
        self.steps = steps
        self.length = length
        self.last_length = last_length
        self.growth = growth
        self.last_growth = last_growth

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; an image that cannot be fooled comes back as it is."""
        best, rows, images = Best(problem, norm=1), problem.all_rows(), problem.images
        radius = torch.full_like(images[:, 0, 0, 0], float("inf"))
        point = images
        for step in range(self.steps):
            asked = point.detach().requires_grad_(True)
            margin = problem.margin(problem.network(asked, rows), rows)
            (gradient,) = torch.autograd.grad(margin.sum(), [asked])
            with torch.no_grad():
                best.take(point, rows, margin)
                done = 0.5 * (1 - math.cos(math.pi * step / self.steps))
                length = self.length + done * (self.last_length - self.length)
                growth = self.growth + done * (self.last_growth - self.growth)
                change = point - images
                radius = _resized(radius, growth, margin, gradient, change, best.exact)
                size = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
                point = (images + within_l1(change - length * gradient / size, radius, images)).clamp(0, 1)
            if step % SETTLED == SETTLED - 1:
                best.settle()
        with torch.no_grad():
            best.take(point, rows, problem.margin(problem.network(point, rows), rows))
        return fewest(problem, best.images())


def _resized(
    radius: Tensor, growth: float, margin: Tensor, gradient: Tensor, change: Tensor, shortest: Tensor
) -> Tensor:
    """The next ball of each image: smaller where it is fooled, larger where it was before, else just past the boundary.

    Where the boundary lies the linearised network says: L1 gets there soonest along the steepest value.
    """
    steepest = gradient.flatten(1).abs().amax(dim=1).clamp_min(1e-30)
    boundary = change.flatten(1).abs().sum(dim=1) + margin.clamp_min(0) / steepest
    larger = torch.where(shortest.isinf(), boundary, radius) * (1 + growth)
    return torch.where(margin < 0, torch.minimum(radius * (1 - growth), shortest), larger)


def within_l1(change: Tensor, radius: Tensor, images: Tensor) -> Tensor:
    """The nearest changes whose L1 norm is at most `radius` and that lead to pixels in [0, 1].

    Both at once: projected onto the ball alone, steep values would take up all of it and then be cut off at the end of
    their range (Croce and Hein, "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers", 2021). The
    same is taken off every change, down to nothing; how much is found by bisection.

    Args:
        change: `(images, channels, height, width)`.
        radius: not below 0, `(images,)`.
        images: in [0, 1], as `change`.
    """
    size, room = change.abs().flatten(1), torch.where(change > 0, 1 - images, images).flatten(1)

    def left(taken_off: Tensor) -> Tensor:
        return torch.minimum((size - taken_off[:, None]).clamp_min(0), room)

    low, high = torch.zeros_like(radius), size.amax(dim=1)
    high = torch.where(left(low).sum(dim=1) <= radius, 0, high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = left(middle).sum(dim=1) <= radius
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return change.sign() * left(high).view_as(change)
