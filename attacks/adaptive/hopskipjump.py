"""HopSkipJump on the combined decision: an attacker who learns of an image only whether it evades.

Source: Chen, Jordan and Wainwright, "HopSkipJumpAttack: a Query-Efficient Decision-Based Attack", 2020, in L-inf. It
starts at a clean image of another label that the detector lets pass, which evades but is far away, and walks along the
boundary of evading images towards the image under attack: estimate the boundary's direction from random versions, step
along its signs, go straight back to the boundary.

Foolbox's version, which `attacks.methods.library` uses for the plain attack, does not serve here: it asks for one
version of each image at a time and estimates directions from changes far below the 8 bits in which a decision is made.
Here changes are about a level, an estimate is one batch of versions, and an image within the budget is done.
"""

import torch
from torch import Tensor

from attacks.adaptive.descent import defence_in
from attacks.problem import Problem, rounded
from detector.errors import RequestError

FINEST = 1.5 / 255  # root mean square of the random changes, at least: smaller ones vanish in 8 bits
ROUNDING = 1e-6  # of a distance in float32, far below a level
TOGETHER = 250  # versions in one batch


class HopSkipJumpEvasion:
    """From the nearest clean images of other labels along the boundary of what evades, in L-inf, image by image."""

    def __init__(self, budget: float, steps: int = 30, restarts: int = 1, queries: int = 100) -> None:
        """An L-inf attack.

        Args:
            budget: largest change of a pixel, in [0, 1].
            steps: of each walk.
            restarts: walks, each from the next nearest clean image.
            queries: of the first estimate of a direction; the k-th takes the root of k times as many.
        """
        self.budget = budget
        self.steps = steps
        self.restarts = restarts
        self.queries = queries

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1], moved into the budget where they ended outside it.

        Raises:
            RequestError: no clean image has a label that the attack wants.
        """
        result = problem.images.clone()
        for row in problem.all_rows().split(1):
            origin = problem.images[row]
            best = torch.full_like(origin, 2.0)
            for start in _nearest_guides(problem, row, self.restarts):
                point = self._walk(problem, row, start[None])
                if _distance(point, origin) < _distance(best, origin):
                    best = point
                if _distance(best, origin) <= self.budget + ROUNDING:
                    break
            result[row] = _within(best, origin, self.budget)
        return rounded(result)

    def _walk(self, problem: Problem, row: Tensor, start: Tensor) -> Tensor:
        """An image that evades, `(1, channels, height, width)`: as near as the walk came, or within the budget."""
        origin, point = problem.images[row], start
        if not problem.reached(point, row):
            return point
        best = point = self._to_boundary(problem, row, point)
        for step in range(1, self.steps + 1):
            distance = _distance(point, origin)
            if distance <= self.budget + ROUNDING:
                break
            direction = self._direction(problem, row, point, round(self.queries * step**0.5), distance).sign()
            stride = distance / step**0.5
            while stride > 0.5 / 255:
                proposal = (point + stride * direction).clamp(0, 1)
                if problem.reached(proposal, row):
                    point = self._to_boundary(problem, row, proposal)
                    best = min(best, point, key=lambda each: _distance(each, origin))
                    break
                stride /= 2
        return best

    def _direction(self, problem: Problem, row: Tensor, point: Tensor, queries: int, distance: float) -> Tensor:
        """Which way evading images lie, from `queries` random versions of an image on the boundary."""
        changes = problem.draws.uniform(row, queries, *point.shape[1:], low=-1.0, high=1.0)[0]
        changes *= 3**0.5 * max(FINEST, distance / 20)
        versions = (point + changes).clamp(0, 1)
        evades = torch.cat([problem.reached(part, row.expand(len(part))) for part in versions.split(TOGETHER)])
        signs = 2.0 * evades.to(point.dtype) - 1
        if not evades.all() and evades.any():
            signs = signs - signs.mean()
        return (signs[:, None, None, None] * (versions - point)).mean(dim=0, keepdim=True)

    def _to_boundary(self, problem: Problem, row: Tensor, point: Tensor) -> Tensor:
        """The evading image nearest to the original among those between it and `point`, by halving."""
        origin = problem.images[row]
        near, far = 0.0, _distance(point, origin)
        while far - near > 0.25 / 255:
            middle = max((near + far) / 2, self.budget if near < self.budget < far else 0.0)
            if problem.reached(_within(point, origin, middle), row):
                far = middle
            else:
                near = middle
            if far <= self.budget + ROUNDING:
                break
        return _within(point, origin, far)


def _distance(point: Tensor, origin: Tensor) -> float:
    return float((point - origin).abs().max())


def _within(point: Tensor, origin: Tensor, distance: float) -> Tensor:
    return torch.minimum(torch.maximum(point, origin - distance), origin + distance)


def _nearest_guides(problem: Problem, row: Tensor, count: int) -> Tensor:
    """The nearest guides of a label that the attack wants of this image."""
    guides = defence_in(problem).guides
    wanted = guides.labels != problem.labels[row]
    if problem.targets is not None:
        wanted = guides.labels == problem.targets[row]
    if not wanted.any():
        raise RequestError(f"expected clean guide images of a label other than {int(problem.labels[row])}, got none")
    images = guides.images[wanted].to(problem.images.dtype)
    distances = (images - problem.images[row]).flatten(1).norm(dim=1)
    return images[distances.argsort()[:count]]
