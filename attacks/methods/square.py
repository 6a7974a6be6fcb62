"""Square: a black-box attack that repaints random squares, and keeps what brings the network nearer to a mistake.

torchattacks' version draws one square for the whole batch, so that a result depends on its neighbours, and is always
seeded alike; neither its squares nor the published ones ever reach the last row and column. Source: Andriushchenko et
al., "Square Attack: a Query-Efficient Black-Box Adversarial Attack via Random Search", 2020 (L-inf).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attacks.methods.gradient import project
from attacks.problem import Problem, rounded

SHRINKING = ((10, 2), (50, 4), (200, 8), (500, 16), (1000, 32), (2000, 64), (4000, 128), (6000, 256), (8000, 512))
BLOCK = 50  # queries whose random numbers are drawn at once

# Points and the rows that they are versions of -> what is to become small, and whether the goal is reached, `(rows,)`.
Ask = Callable[[Problem, Tensor, Tensor], tuple[Tensor, Tensor]]


def ask_network(problem: Problem, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The lead of the right label, or how far the target is behind, for points rounded to 8 bits."""
    with torch.no_grad():
        logits = problem.network(rounded(points), rows)
    return problem.margin(logits, rows), problem.is_goal(logits, rows)


class Square:
    """Random search with squares that shrink, for each image from its own random numbers; an image fooled leaves."""

    def __init__(self, budget: float, queries: int = 1000, share: float = 0.8, ask: Ask = ask_network) -> None:
        """An L-inf attack.

        Args:
            budget: largest change of a pixel, in [0, 1].
            queries: forward passes for each image, after that of the starting point.
            share: of the image's pixels in the first squares.
            ask: what is made small.
        """
        self.budget = budget
        self.queries = queries
        self.share = share
        self.ask = ask

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; where none fools, the one of the lowest margin."""
        return self.run(problem, problem.all_rows(), problem.images.clone())

    def run(self, problem: Problem, rows: Tensor, result: Tensor) -> Tensor:
        """Attack the images at `rows`, and put what comes of it into `result`, which is returned."""
        if len(rows) == 0:
            return result
        channels, height, width = problem.images.shape[1:]
        origin = problem.images[rows]
        stripes = problem.draws.uniform(rows, channels, 1, width, low=-1.0, high=1.0).sign()
        point = project(origin + self.budget * stripes, origin, "linf", self.budget)
        margin, won = self.ask(problem, point, rows)
        drawn = torch.empty(0)
        for query in range(self.queries):
            result[rows] = point
            stay = ~won
            if not stay.any():
                break
            if won.any():
                rows, origin, point, margin, drawn = (part[stay] if len(part) else part
                                                      for part in (rows, origin, point, margin, drawn))  # fmt: skip
            if query % BLOCK == 0:
                drawn = problem.draws.uniform(rows, BLOCK, 2 + channels)
            numbers = drawn[:, query % BLOCK]
            side = max(round(math.sqrt(self._share_at(query) * height * width)), 1)
            inside = self._within(numbers[:, 0], height, side)[:, None, :, None]
            inside = inside & self._within(numbers[:, 1], width, side)[:, None, None, :]
            colour = (numbers[:, 2:] - 0.5).sign()[:, :, None, None]
            repainted = project(point + 2 * self.budget * colour, origin, "linf", self.budget)
            proposal = torch.where(inside, repainted, point)
            new_margin, won = self.ask(problem, proposal, rows)
            better = (new_margin < margin) | won
            point = torch.where(better[:, None, None, None], proposal, point)
            margin = torch.where(better, new_margin, margin)
        result[rows] = point
        return result

    def _share_at(self, query: int) -> float:
        place = int(query / self.queries * 10000)
        return self.share / max((shrink for start, shrink in SHRINKING if place > start), default=1)

    @staticmethod
    def _within(numbers: Tensor, size: int, side: int) -> Tensor:
        """Which of `size` positions lie in a stretch of `side` that begins where `numbers` in [0, 1) say."""
        start = (numbers * (max(size - side, 0) + 1)).long()[:, None]
        positions = torch.arange(size, device=numbers.device)
        return (positions >= start) & (positions < start + side)
