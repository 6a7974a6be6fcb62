"""Attacks that seek the smallest change: batched, each image on its own, and alive after rounding to 8 bits.

torchattacks has both, but its C&W has no binary search and stops by the *sum* over the batch, so that a result depends
on its neighbours, and its DeepFool walks image by image and stops so close to the boundary that 8-bit rounding undoes
nearly all of its success. Sources: Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017;
Moosavi-Dezfooli et al., "DeepFool", 2016.
"""

import torch
from torch import Tensor

from attacks.problem import Problem

OVERSHOOTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


class CarliniWagner:
    """C&W-L2 with a binary search for the constant of each image; confidence 0.

    The steps go through pixels that are clipped to [0, 1] after each. The paper's change of variables (tanh) has no
    slope at black and white, and those are half of the pixels of some data sets.
    """

    def __init__(self, steps: int = 100, searches: int = 6, start: float = 0.5, learning_rate: float = 0.01) -> None:
        """An attack.

        Args:
            steps: of Adam, for each constant.
            searches: constants tried for each image.
            start: first constant.
            learning_rate: of Adam, in pixels of [0, 1].
        """
        self.steps = steps
        self.searches = searches
        self.start = start
        self.learning_rate = learning_rate

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; an image that cannot be fooled comes back as it is."""
        images, rows, count = problem.images, problem.all_rows(), len(problem)
        constant = images.new_full((count,), self.start)
        low, high = torch.zeros_like(constant), torch.full_like(constant, float("inf"))
        best, best_distance = images.clone(), torch.full_like(constant, float("inf"))
        for _ in range(self.searches):
            fooled_now = torch.zeros(count, dtype=torch.bool, device=images.device)
            point = images.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([point], lr=self.learning_rate)
            for _ in range(self.steps):
                distance = (point - images).square().sum(dim=(1, 2, 3))
                margin = problem.margin(problem.network(point, rows), rows)
                with torch.no_grad():
                    better = (margin < 0) & (distance < best_distance)
                    best[better], best_distance[better] = point.detach()[better], distance[better]
                    fooled_now |= margin < 0
                loss = (distance + constant * margin.clamp_min(0)).sum()
                (point.grad,) = torch.autograd.grad(loss, [point])
                optimizer.step()
                with torch.no_grad():
                    point.clamp_(0, 1)
            high = torch.where(fooled_now, torch.minimum(high, constant), high)
            low = torch.where(fooled_now, low, torch.maximum(low, constant))
            constant = torch.where(high.isinf(), constant * 10, (low + high) / 2)
        return overshoot(problem, best)


class DeepFool:
    """Steps to the nearest linearised boundary among all classes, batched, until the label changes."""

    def __init__(self, steps: int = 30, step_overshoot: float = 0.02) -> None:
        """An attack.

        Args:
            steps: at most this many linearisations.
            step_overshoot: how far beyond each linearised boundary a step goes, as a share of the step.
        """
        self.steps = steps
        self.step_overshoot = step_overshoot

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; one that cannot be fooled comes back as far as it got."""
        images, labels = problem.images, problem.labels
        attacked = images.clone()
        active = torch.arange(len(images), device=images.device)
        for _ in range(self.steps):
            points = attacked[active].requires_grad_(True)
            logits = problem.network(points, active)
            right = logits.argmax(dim=1) == labels[active]
            if not right.any():
                break
            step = self._to_nearest_boundary(points, logits, labels[active])
            active, step = active[right], step[right]
            attacked[active] = (attacked[active] + (1 + self.step_overshoot) * step).clamp(0, 1)
        return overshoot(problem, attacked)

    def _to_nearest_boundary(self, points: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        own = logits.gather(1, labels[:, None])
        classes = logits.shape[1]
        gaps = logits - own
        gradients = torch.stack(
            [torch.autograd.grad(gaps[:, k].sum(), points, retain_graph=True)[0] for k in range(classes)], dim=1
        )
        norms = gradients.flatten(2).norm(dim=2).clamp_min(1e-12)
        distances = gaps.detach().abs() / norms
        distances.scatter_(1, labels[:, None], float("inf"))
        nearest = distances.argmin(dim=1)
        rows = torch.arange(len(points), device=points.device)
        length = (gaps.detach().abs()[rows, nearest] + 1e-6) / norms[rows, nearest] ** 2
        step: Tensor = length[:, None, None, None] * gradients[rows, nearest]
        return step


def overshoot(problem: Problem, attacked: Tensor) -> Tensor:
    """Lengthen each change by the smallest of `OVERSHOOTS` that reaches the goal after rounding to 8 bits.

    Returns:
        The lengthened images; the given ones where no length reaches it.
    """
    images, result = problem.images, attacked.clone()
    waiting = problem.all_rows()
    for extra in OVERSHOOTS:
        longer = (images[waiting] + (1 + extra) * (attacked[waiting] - images[waiting])).clamp(0, 1)
        fooled = problem.reached(longer, waiting)
        result[waiting[fooled]] = longer[fooled]
        waiting = waiting[~fooled]
        if len(waiting) == 0:
            break
    return result
