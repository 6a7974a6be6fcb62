"""Attacks that climb the loss inside a budget: FGSM, BIM, PGD and MI-FGSM are one loop with different settings.

torchattacks returns the last iterate, and takes every image through every step. Here an image that fools the network as
it will be stored, rounded to 8 bits, leaves the batch, and one that never does comes back as its best iterate.
Gradients are asked at the unrounded point: steps of less than half a level would else ask the same question again.
Sources: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", 2015 (FGSM); Kurakin et al., "Adversarial
Examples in the Physical World", 2017 (BIM); Madry et al., "Towards Deep Learning Models Resistant to Adversarial
Attacks", 2018 (PGD); Dong et al., "Boosting Adversarial Attacks with Momentum", 2018 (MI-FGSM).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.problem import Problem, rounded


class Ascent:
    """Steps along the sign (L-inf) or the direction (L2) of the gradient of the cross-entropy, projected each time."""

    def __init__(
        self, norm: Literal["linf", "l2"], budget: float, steps: int, step: float = 0.25, start: bool = False,
        momentum: float | None = None, stop: bool = True,
    ) -> None:  # fmt: skip
        """An attack inside `budget`.

        Args:
            norm: of the budget.
            budget: largest change, pixels in [0, 1].
            steps: gradients for each image.
            step: length of a step as a share of the budget.
            start: whether it begins at a random point inside the budget.
            momentum: share of the past direction that is kept; None for none (MI-FGSM: 1).
            stop: whether an image leaves once it is fooled; without it the lowest margin counts, for transfer.
        """
        self.norm = norm
        self.budget = budget
        self.steps = steps
        self.step = step
        self.start = start
        self.momentum = momentum
        self.stop = stop

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]."""
        rows = problem.all_rows()
        origin = problem.images
        points = random_start(problem, rows, self.norm, self.budget) if self.start else origin.clone()
        result, lowest = points.clone(), torch.full_like(origin[:, 0, 0, 0], float("inf"))
        velocity = torch.zeros_like(origin)
        for index in range(self.steps + 1):
            asked = points.detach().requires_grad_(index < self.steps)
            logits = problem.network(asked, rows)
            with torch.no_grad():
                margin = problem.margin(logits, rows)
                won = problem.is_goal(logits, rows)
                if self.stop:  # asked of the rounded image, which takes a pass
                    won[won.clone()] = problem.reached(points[won], rows[won])
                if index > 0 or self.start:  # the clean image is no attack
                    better = (margin < lowest[rows]) | won if self.stop else margin < lowest[rows]
                    result[rows[better]], lowest[rows[better]] = points[better], margin[better]
                staying = ~won if self.stop else torch.ones_like(won)
                if index == self.steps or not staying.any():
                    break
            gradient = _slope(problem, logits, asked, rows, staying)
            with torch.no_grad():
                rows, points = rows[staying], points[staying]
                if self.momentum is not None:
                    size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
                    velocity[rows] = gradient = self.momentum * velocity[rows] + gradient / size
                points = points + self.step * self.budget * steepest(gradient, self.norm)
                points = project(points, origin[rows], self.norm, self.budget)
        return result


def _slope(problem: Problem, logits: Tensor, asked: Tensor, rows: Tensor, staying: Tensor) -> Tensor:
    """Where the loss grows, for those that stay: that of the right label, or, with targets, less of the target's."""
    sign, labels = (1, problem.labels) if problem.targets is None else (-1, problem.targets)
    loss = sign * F.cross_entropy(logits[staying], labels[rows[staying]], reduction="sum")
    with problem.network.only(rows[staying]):
        (gradient,) = torch.autograd.grad(loss, [asked])
    return gradient[staying]


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The change of length 1 in `norm` along which a loss with this gradient grows most."""
    if norm == "linf":
        return gradient.sign()
    direction: Tensor = gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
    return direction


def project(points: Tensor, origin: Tensor, norm: str, budget: float) -> Tensor:
    """`points` moved into [0, 1] and so near to `origin` that they keep to the budget also when rounded to 8 bits."""
    if norm == "linf":
        # Nothing is lost by staying between the outermost levels inside the budget: what lies beyond rounds to them.
        lowest = ((origin - budget) * 255 - 1e-3).ceil().clamp_min(0) / 255
        highest = ((origin + budget) * 255 + 1e-3).floor().clamp_max(255) / 255
        # A budget that spans no level leaves the clean image, which a float image need not have on a level.
        return torch.where(lowest > highest, origin, torch.minimum(torch.maximum(points, lowest), highest))
    change = points - origin
    share = (budget / change.flatten(1).norm(dim=1).clamp_min(1e-30)).clamp_max(1)

    def at(share: Tensor) -> Tensor:
        return (origin + change * share[:, None, None, None]).clamp(0, 1)

    def keeps(share: Tensor) -> Tensor:
        fits: Tensor = (rounded(at(share)) - origin).flatten(1).norm(dim=1) <= budget
        return fits

    kept = keeps(share)
    if not kept.all():  # rounding makes some changes longer: shorten those by as little as will do
        low, high = torch.zeros_like(share), share
        for _ in range(8):
            middle = (low + high) / 2
            fits = keeps(middle)
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        share = torch.where(kept, share, low)
    return at(share)


def random_start(problem: Problem, rows: Tensor, norm: str, budget: float) -> Tensor:
    """A random point inside the budget of each image: uniform (L-inf), or of uniform length and direction (L2)."""
    origin = problem.images[rows]
    if norm == "linf":
        change = problem.draws.uniform(rows, *origin.shape[1:], low=-budget, high=budget)
    else:
        direction = steepest(problem.draws.normal(rows, *origin.shape[1:]), "l2")
        change = direction * problem.draws.uniform(rows, 1, 1, 1, high=budget)
    return project(origin + change, origin, norm, budget)
