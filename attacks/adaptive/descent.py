"""The loop of every adaptive attack with gradients: several descents from several starts, the best iterate of all.

An image has evaded when its version in 8 bits has a wrong label and the real detector lets it pass; it then leaves.
Only what could be stored is ever looked at: each forward pass sees the image rounded to 8 bits, and its gradient moves
the image as it was before rounding. One step is one forward and one backward pass. The length of a step depends neither
on how many steps there are nor on how many descents follow, so that more of either can only help.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.adaptive.defence import Defence, Seen
from attacks.methods.gradient import project
from attacks.problem import Problem, rounded
from detector.errors import RequestError

# Share of the past direction that is kept, as in Dong et al., "Boosting Adversarial Attacks with Momentum", 2018. Label
# and score pull in turn, and without it an image shuttles between them: on a Fashion-MNIST detector (100 images, 8/255,
# one descent of 60 steps) it takes Selective PGD from 63 to 86 %, Orthogonal PGD from 71 to 82 %.
MOMENTUM = 0.75

# What was seen of some images, the images, and their rows -> for each of them the direction to walk away from.
Slope = Callable[[Seen, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One descent from one start.

    Attributes:
        slope: gives the direction.
        step: length of a step, as a share of the budget.
        start: at the image itself, or at a random point within the budget.
        shape: whether a step goes along the signs of the slope, or along the slope itself, with as long a step.
    """

    slope: Slope
    step: float
    start: Literal["image", "random"]
    shape: Literal["sign", "slope"] = "sign"


class Best:
    """The best version of each image so far: one that evades, else the wrong one of the lowest score, else the one
    whose right class leads least."""

    def __init__(self, problem: Problem) -> None:
        """No version better than the image itself."""
        self.points = problem.images.clone()
        self.evaded = torch.zeros(len(problem), dtype=torch.bool, device=problem.images.device)
        self._problem = problem
        self._defence = defence_in(problem)
        self._fooled = torch.zeros_like(self.evaded)
        self._value = torch.full((len(problem),), torch.inf, dtype=torch.float64, device=problem.images.device)

    def note(self, seen: Seen, points: Tensor, rows: Tensor) -> Tensor:
        """Keep what is better of `points`, versions in 8 bits of the images at `rows`; which of them stay to go on."""
        with torch.no_grad():
            # A copy: the gradient may still need the scores themselves.
            scores = seen.scores.detach().to(torch.float64, copy=True)
            wrong = self._problem.is_goal(seen.logits, rows)
            slack = 1e-3 * self._defence.spread
            asked = wrong & (scores <= self._defence.threshold + slack) if self._defence.exact else wrong
            evaded = torch.zeros_like(wrong)
            if asked.any():
                versions = self._problem.network.counted(points[asked].detach(), rows[asked])
                labels, real = self._defence.judge(versions)
                scores[asked] = real.double()
                # A hair below the threshold: another batch may round the last bit another way.
                unseen = real <= self._defence.threshold - 1e-6 * self._defence.spread
                evaded[asked] = self._problem.is_wanted(labels, rows[asked]) & unseen
            value = torch.where(wrong, scores, self._problem.margin(seen.logits, rows).double())
            level, before = wrong.long() + evaded, self._fooled[rows].long() + self.evaded[rows]
            better = (level > before) | ((level == before) & (value < self._value[rows]))
            kept = rows[better]
            self.points[kept], self._value[kept] = points.detach()[better], value[better]
            self._fooled[kept], self.evaded[kept] = wrong[better], evaded[better]
            return ~evaded


def defence_in(problem: Problem) -> Defence:
    """What the attacker knows.

    Raises:
        RequestError: the problem has no detector.
    """
    if not isinstance(problem.watcher, Defence):
        raise RequestError("expected a detector to evade, got none; `pathguard fit` makes one")
    return problem.watcher


def descend(problem: Problem, budget: float, steps: int, attempts: Sequence[Attempt], momentum: float) -> Tensor:
    """Try one descent after the other on the images that have not evaded yet.

    Args:
        problem: what is attacked; its detector is known.
        budget: largest change of a pixel, in [0, 1].
        steps: of each descent.
        attempts: the descents.
        momentum: share of the past direction that is kept.

    Returns:
        The best version of each image in [0, 1], rounded to 8 bits.
    """
    defence, best = defence_in(problem), Best(problem)
    for attempt in attempts:
        rows = torch.nonzero(~best.evaded).squeeze(1)
        if len(rows) == 0:
            break
        origin = problem.images[rows]
        points = origin
        if attempt.start == "random":
            away = problem.draws.uniform(rows, *origin.shape[1:], low=-budget, high=budget)
            points = project(origin + away, origin, "linf", budget)
        velocity = torch.zeros_like(origin)
        for index in range(steps + 1):
            last = index == steps
            asked = rounded(points).requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                seen = defence.see(problem.network.counted(asked, rows))
            staying = best.note(seen, asked, rows)
            if last or not staying.any():
                break
            with problem.network.only(rows[staying]):  # what is done takes no gradient more
                slope = attempt.slope(seen, asked, rows)
            slope = slope / slope.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
            velocity = (momentum * velocity + slope)[staying]
            rows, points, origin = rows[staying], points[staying], origin[staying]
            points = project(points - attempt.step * budget * _along(velocity, attempt.shape), origin, "linf", budget)
    return best.points


def stride(step: float, restart: int) -> float:
    """The length of a restart's steps: `step`, then half of it, then a quarter, and so on in turn."""
    return step * (1.0, 0.5, 0.25)[restart % 3]


def slope_of(loss: Tensor, points: Tensor, keep: bool = False) -> Tensor:
    """The gradient of each image's loss, `(images,)`, at `points`; `keep` where more gradients follow."""
    (slope,) = torch.autograd.grad(loss.sum(), [points], retain_graph=keep)
    return slope


def _along(slope: Tensor, shape: str) -> Tensor:
    if shape == "sign":
        return slope.sign()
    length = slope.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
    longer: Tensor = slope / length * slope[0].numel() ** 0.5
    return longer
