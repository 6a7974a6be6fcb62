"""AutoAttack and its members: APGD on cross-entropy and DLR, targeted APGD, Square, and FAB from torchattacks.

torchattacks' own AutoAttack runs its members for 10 steps where the published one runs 100, seeds each run alike, and
keeps fooled images in the batch to the end. Source: Croce and Hein, "Reliable Evaluation of Adversarial Robustness with
an Ensemble of Diverse Parameter-Free Attacks", 2020; the settings are those of its version "standard".
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.methods.gradient import project, steepest
from attacks.methods.library import fab_towards
from attacks.methods.square import Square
from attacks.problem import Problem, margin_over_others

Loss = Callable[[Tensor, Tensor], Tensor]  # logits and rows -> what is to grow, `(rows,)`


class AutoPGD:
    """Projected gradient ascent with momentum that sets its own step size, and stops for an image that is fooled."""

    def __init__(
        self, norm: Literal["linf", "l2"], budget: float, loss: Literal["ce", "dlr"], steps: int = 100,
        restarts: int = 1, rho: float = 0.75,
    ) -> None:  # fmt: skip
        """An attack inside `budget`.

        Args:
            norm: of the budget.
            budget: largest change, pixels in [0, 1].
            loss: cross-entropy, or the difference of logits ratio; with targets, of the target.
            steps: gradients for each image and restart, after that of the starting point.
            restarts: runs from random points, while the image is not fooled.
            rho: share of steps that must improve the loss for the step size to stay.
        """
        self.norm = norm
        self.budget = budget
        self.loss = loss
        self.steps = steps
        self.restarts = restarts
        self.rho = rho

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; where none fools, the one of the highest loss."""

        def loss(logits: Tensor, rows: Tensor) -> Tensor:
            if problem.targets is None:
                labels = problem.labels[rows]
                return _cross_entropy(logits, labels) if self.loss == "ce" else dlr(logits, labels)
            targets = problem.targets[rows]
            if self.loss == "ce":
                return -_cross_entropy(logits, targets)
            return dlr_towards(logits, problem.labels[rows], targets)

        result, rows = problem.images.clone(), problem.all_rows()
        highest = torch.full_like(result[:, 0, 0, 0], float("-inf"))
        for _ in range(self.restarts):
            rows = self.run(problem, rows, loss, result, highest)
            if len(rows) == 0:
                break
        return result

    def run(self, problem: Problem, rows: Tensor, loss: Loss, result: Tensor, highest: Tensor | None = None) -> Tensor:
        """One run from a random point for the images at `rows`; the rows that it did not fool.

        Args:
            problem: what is attacked.
            rows: images that take part.
            loss: what is to grow.
            result: where the attacked images go, `(batch, channels, height, width)`.
            highest: loss of what lies there, `(batch,)`, of earlier runs that made the same loss grow; kept up to date.
                Without it what lies there is written over.
        """
        highest = torch.full_like(result[:, 0, 0, 0], float("-inf")) if highest is None else highest
        window, least, shrink = (max(int(share * self.steps), 1) for share in (0.22, 0.06, 0.03))
        origin = problem.images[rows]
        point = self._start(problem, rows)
        before, best = point, point
        values = [torch.full_like(origin[:, 0, 0, 0], fill) for fill in (float("-inf"), 2 * self.budget, 0, 0)]
        best_value, length, improved, last_value = values
        best_at_check, gradient, best_gradient = best_value, torch.zeros_like(point), torch.zeros_like(point)
        just_halved = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        next_check = window
        for index in range(self.steps + 1):
            asked = point.detach().requires_grad_(index < self.steps)
            logits = problem.network(asked, rows)
            won = problem.is_goal(logits, rows)
            won[won.clone()] = problem.reached(point[won], rows[won])
            stay = ~won
            value = loss(logits, rows)
            if index < self.steps and stay.any():
                with problem.network.only(rows[stay]):
                    (gradient,) = torch.autograd.grad(value[stay].sum(), [asked])
            value = value.detach()
            better = (value > best_value) | won
            best, best_gradient = _where(better, point, best), _where(better, gradient, best_gradient)
            best_value = torch.maximum(value, best_value)
            if index > 0:
                improved = improved + (value > last_value)
            last_value = value
            kept = (value > highest[rows]) | won
            result[rows[kept]], highest[rows[kept]] = point[kept], value[kept]
            if index == self.steps:
                return rows[~won]
            if index == next_check:
                halve = (improved <= self.rho * window) | (~just_halved & (best_at_check >= best_value))
                just_halved, best_at_check = halve, best_value
                length = torch.where(halve, length / 2, length)
                point, gradient = _where(halve, best, point), _where(halve, best_gradient, gradient)
                improved = torch.zeros_like(improved)
                window = max(window - shrink, least)
                next_check = index + window
            if not stay.any():
                return rows[stay]
            if won.any():
                rows, origin, point, before, best, gradient, best_gradient = (
                    part[stay] for part in (rows, origin, point, before, best, gradient, best_gradient)
                )
                best_value, length, improved, last_value, best_at_check, just_halved = (
                    part[stay] for part in (best_value, length, improved, last_value, best_at_check, just_halved)
                )
            keep = 0.75 if index > 0 else 1.0
            step = project(
                point + length[:, None, None, None] * steepest(gradient, self.norm), origin, self.norm, self.budget
            )
            step = point + keep * (step - point) + (1 - keep) * (point - before)
            before, point = point, project(step, origin, self.norm, self.budget)
        raise AssertionError("the loop returns at its last step")

    def _start(self, problem: Problem, rows: Tensor) -> Tensor:
        """A random point on the edge of the budget, as the published code draws it."""
        origin = problem.images[rows]
        if self.norm == "linf":
            change = problem.draws.uniform(rows, *origin.shape[1:], low=-1.0, high=1.0)
            change = change / change.flatten(1).abs().amax(dim=1)[:, None, None, None]
        else:
            change = steepest(problem.draws.normal(rows, *origin.shape[1:]), "l2")
        return project(origin + self.budget * change, origin, self.norm, self.budget)


class AutoAttack:
    """The four members of the published "standard" version, each on the images that the ones before did not fool."""

    untargeted = True

    def __init__(self, budget: float, steps: int = 100, targets: int = 9, queries: int = 5000) -> None:
        """An L-inf attack.

        Args:
            budget: largest change of a pixel, in [0, 1].
            steps: of APGD-CE, of APGD-T for each target, and of FAB-T for each target.
            targets: classes that APGD-T and FAB-T aim at, from the likeliest wrong one on.
            queries: of Square.
        """
        self.budget = budget
        self.steps = steps
        self.targets = targets
        self.queries = queries

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]."""
        result, rows = problem.images.clone(), problem.all_rows()
        climb = AutoPGD("linf", self.budget, "dlr", self.steps)
        rows = climb.run(problem, rows, lambda logits, rows: _cross_entropy(logits, problem.labels[rows]), result)
        if len(rows) == 0:
            return result
        with torch.no_grad():
            logits = problem.network(problem.images[rows], rows)
        order = torch.full((len(problem), logits.shape[1]), -1, device=rows.device)  # label, likeliest wrong one, ...
        order[rows] = logits.scatter(1, problem.labels[rows, None], float("inf")).argsort(dim=1, descending=True)

        def towards(rank: int) -> Loss:
            return lambda logits, rows: dlr_towards(logits, problem.labels[rows], order[rows, rank])

        ranks = range(1, 1 + min(self.targets, logits.shape[1] - 1))
        for rank in ranks:
            if len(rows):
                rows = climb.run(problem, rows, towards(rank), result)
        for rank in ranks:
            if len(rows):
                rows = fab_towards(problem, rows, rank, self.budget, self.steps, result)
        return Square(self.budget, self.queries).run(problem, rows, result)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """The difference of logits ratio, `(batch,)`: grows as the right class falls behind; blind to the logits' scale.

    With two classes there is no third to set the scale, and the bare difference is taken.
    """
    difference = -margin_over_others(logits, labels)
    if logits.shape[1] < 3:
        return difference
    ordered = logits.sort(dim=1, descending=True).values
    return difference / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def dlr_towards(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The same towards one class, `(batch,)`; with fewer than four classes the bare difference."""
    difference = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
    if logits.shape[1] < 4:
        return difference
    ordered = logits.sort(dim=1, descending=True).values
    return difference / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)


def _where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(condition[:, None, None, None], one, other)
