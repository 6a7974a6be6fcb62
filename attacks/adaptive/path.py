"""Path matching: give an image the calculation path of a clean image of another class.

A detector that reads the path alone cannot tell it from that clean image. Source of the idea, for hidden activations:
Sabour, Cao, Faghri and Fleet, "Adversarial Manipulation of Deep Representations", ICLR 2016; their guide image is ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.adaptive.defence import Guides, Seen
from attacks.adaptive.descent import MOMENTUM, Attempt, Slope, defence_in, descend, slope_of, stride
from attacks.adaptive.labels import label_loss
from attacks.problem import Problem
from detector.errors import RequestError


class PathMatching:
    """PGD on the distance between gate logits and those of a guide, plus a weight times the guide's cross-entropy."""

    def __init__(
        self, budget: float, steps: int = 200, restarts: int = 5, step: float = 0.25, weight: float = 0.1,
        momentum: float = MOMENTUM,
    ) -> None:  # fmt: skip
        """An L-inf attack.

        Args:
            budget: largest change of a pixel, in [0, 1].
            steps: of each descent.
            restarts: descents, each to another guide: the nearest of another label, the next nearest, and so on. The
                first begins at the image itself.
            step: length of a step as a share of the budget; the second restart takes half of it, the third a quarter,
                the fourth `step` again.
            weight: of the cross-entropy to the guide's label, beside the mean square of the logits' differences, each
                in units of its standard deviation over all guides.
            momentum: share of the past direction that is kept.
        """
        self.budget = budget
        self.steps = steps
        self.restarts = restarts
        self.step = step
        self.weight = weight
        self.momentum = momentum

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]."""
        defence = defence_in(problem)
        guides = defence.guides
        spread = guides.gates.std(dim=0, correction=0).clamp_min(1e-6)
        rows = problem.all_rows()
        with torch.no_grad():
            gates = defence.see(problem.network.counted(problem.images, rows)).gates
        ranked = _ranked(problem, gates / spread, guides, guides.gates / spread)
        attempts = [
            Attempt(
                self._slope(problem, guides, spread, _of_each(ranked, restart)), stride(self.step, restart),
                "random" if restart else "image",
            )
            for restart in range(self.restarts)
        ]  # fmt: skip
        return descend(problem, self.budget, self.steps, attempts, self.momentum)

    def _slope(self, problem: Problem, guides: Guides, spread: Tensor, chosen: Tensor) -> Slope:
        labels = guides.labels[chosen]

        def slope(seen: Seen, points: Tensor, rows: Tensor) -> Tensor:
            apart = ((seen.gates - guides.gates[chosen[rows]]) / spread).square().mean(dim=1)
            return slope_of(apart + self.weight * label_loss(problem, seen.logits, rows, labels), points)

        return slope


def _ranked(problem: Problem, gates: Tensor, guides: Guides, guide_gates: Tensor) -> list[Tensor]:
    """For each image the guides of a label that the attack wants, nearest path first; how many, differs."""
    distances = torch.cdist(gates, guide_gates)
    wanted = guides.labels[None] != problem.labels[:, None]
    if problem.targets is not None:
        wanted = guides.labels[None] == problem.targets[:, None]
    if not wanted.any(dim=1).all():
        raise RequestError("expected clean guide images of every label that an attack wants, got none for some images")
    ranked = distances.masked_fill(~wanted, float("inf")).argsort(dim=1)
    return [row[: int(fitting)] for row, fitting in zip(ranked, wanted.sum(dim=1), strict=True)]


def _of_each(ranked: Sequence[Tensor], restart: int) -> Tensor:
    """The guide of each image for a restart, `(images,)`; who has fewer begins with the nearest again."""
    return torch.stack([row[restart % len(row)] for row in ranked])
