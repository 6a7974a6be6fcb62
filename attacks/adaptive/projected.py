"""Selective and Orthogonal PGD: never trade the label against the score, work on one of them at a time.

Source: Bryniarski, Hingun, Pachuca, Wang and Carlini, "Evading Adversarial Example Detection Defenses with Orthogonal
Projected Gradient Descent", ICLR 2022. A joint loss wastes its budget where the two gradients cancel out. Selective PGD
follows the label's gradient while the label is right and the detector's once it is wrong. Orthogonal PGD takes out of
each gradient the part along the other, so that a step for one leaves the other as it is.
"""

import torch
from torch import Tensor

from attacks.adaptive.defence import Seen
from attacks.adaptive.descent import MOMENTUM, Attempt, Slope, descend, slope_of, stride
from attacks.adaptive.labels import headings, label_loss
from attacks.problem import Problem

LEAD = 0.05


class SelectivePGD:
    """Towards a wrong label until it leads, then towards a low score."""

    def __init__(
        self, budget: float, steps: int = 200, restarts: int = 5, step: float = 0.25, momentum: float = MOMENTUM,
        lead: float = LEAD,
    ) -> None:  # fmt: skip
        """An L-inf attack.

        Args:
            budget: largest change of a pixel, in [0, 1].
            steps: of each descent.
            restarts: descents; the first begins at the image itself.
            step: length of a step as a share of the budget; the second restart takes half of it, the third a quarter,
                the fourth `step` again.
            momentum: share of the past direction that is kept.
            lead: of the wrong label, in logits, from which on the detector's gradient is followed.
        """
        self.budget = budget
        self.steps = steps
        self.restarts = restarts
        self.step = step
        self.momentum = momentum
        self.lead = lead

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]."""
        attempts = [
            Attempt(self._slope(problem, heading), stride(self.step, restart), "random" if restart else "image")
            for restart, heading in enumerate(headings(problem, self.restarts))
        ]
        return descend(problem, self.budget, self.steps, attempts, self.momentum)

    def _slope(self, problem: Problem, heading: Tensor | None) -> Slope:
        def slope(seen: Seen, points: Tensor, rows: Tensor) -> Tensor:
            wrong = problem.margin(seen.logits, rows) < -self.lead
            label = label_loss(problem, seen.logits, rows, heading).double()
            return slope_of(torch.where(wrong, seen.scores.double(), label), points)

        return slope


class OrthogonalPGD:
    """The same, each gradient without its part along the other."""

    def __init__(
        self, budget: float, steps: int = 200, restarts: int = 5, step: float = 0.25, momentum: float = MOMENTUM,
        lead: float = LEAD,
    ) -> None:  # fmt: skip
        """An L-inf attack.

        Two restarts of four (the second and third) step along the projected gradient itself and not along its signs:
        signs make more of the budget, but are no longer orthogonal.

        Args:
            budget: largest change of a pixel, in [0, 1].
            steps: of each descent.
            restarts: descents; the first begins at the image itself.
            step: length of a step as a share of the budget; the second restart takes half of it, the third a quarter,
                the fourth `step` again.
            momentum: share of the past direction that is kept.
            lead: of the wrong label, in logits, from which on the detector's gradient is followed.
        """
        self.budget = budget
        self.steps = steps
        self.restarts = restarts
        self.step = step
        self.momentum = momentum
        self.lead = lead

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]."""
        attempts = [
            Attempt(
                self._slope(problem, heading), stride(self.step, restart), "random" if restart else "image",
                "slope" if restart % 4 in (1, 2) else "sign",
            )
            for restart, heading in enumerate(headings(problem, self.restarts))
        ]  # fmt: skip
        return descend(problem, self.budget, self.steps, attempts, self.momentum)

    def _slope(self, problem: Problem, heading: Tensor | None) -> Slope:
        def slope(seen: Seen, points: Tensor, rows: Tensor) -> Tensor:
            wrong = problem.margin(seen.logits, rows) < -self.lead
            label = slope_of(label_loss(problem, seen.logits, rows, heading), points, keep=True)
            score = slope_of(seen.scores, points)
            return torch.where(wrong[:, None, None, None], without(score, label), without(label, score))

        return slope


def without(slope: Tensor, other: Tensor) -> Tensor:
    """`slope` without its part along `other`, image by image, `(images, channels, height, width)`."""
    along = (slope * other).flatten(1).sum(dim=1)
    length = other.square().flatten(1).sum(dim=1)
    share = torch.where(length > 0, along / length.clamp_min(1e-38), 0)
    return slope - share[:, None, None, None] * other
