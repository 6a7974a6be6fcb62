"""The joint loss: a wrong label and a low score at once, with one weight after the other.

Sources: Carlini and Wagner, "Adversarial Examples Are Not Easily Detected: Bypassing Ten Detection Methods", 2017;
Tramer et al., "On Adaptive Attacks to Adversarial Example Defenses", 2020.

Cross-entropy has next to no slope at an image that the network is sure of, so that any weight on the score drowns it
(measured on a Fashion-MNIST detector, 60 images, 8/255, 40 steps: the best of five weights evaded on 43 %). The lead of
the right label in logits keeps its slope, and counts, like the score above the threshold, only until it is gone: one
weight then evaded on 72 %. So that is the loss by default, and cross-entropy a setting.
"""

from torch import Tensor

from attacks.adaptive.defence import Seen
from attacks.adaptive.descent import MOMENTUM, Attempt, Slope, defence_in, descend, slope_of, stride
from attacks.adaptive.labels import headings, label_loss, label_margin
from attacks.problem import Problem
from detector.errors import RequestError

BEYOND = 0.5


class JointLoss:
    """PGD on the label's loss plus a weight times the detector's score, for each weight; the best over all."""

    def __init__(
        self,
        budget: float,
        steps: int = 200,
        restarts: int = 5,
        weights: int = 5,
        lightest: float = 0.1,
        heaviest: float = 10.0,
        step: float = 0.25,
        momentum: float = MOMENTUM,
        loss: str = "margin",
        beyond: float = BEYOND,
    ) -> None:
        """An L-inf attack.

        Args:
            budget: largest change of a pixel, in [0, 1].
            steps: of each descent.
            restarts: descents for each weight; the first begins at the image itself.
            weights: how many, in equal ratios from the lightest to the heaviest (their geometric mean where there is
                one).
            lightest: of the weights, in logits per standard deviation of the scores of clean images; the cross-entropy
                wants a tenth of it.
            heaviest: likewise.
            step: length of a step as a share of the budget; the second restart takes half of it, the third a quarter,
                the fourth `step` again.
            momentum: share of the past direction that is kept.
            loss: of the label: `margin` or `cross-entropy`.
            beyond: how far beyond their goals lead (in logits) and score (in deviations) are still pushed, by `margin`.

        Raises:
            RequestError: the loss is unknown, or the lightest weight is not above 0 and up to the heaviest.
        """
        if not 0 < lightest <= heaviest:
            raise RequestError(f"expected a lightest weight above 0 and up to {heaviest:g}, got {lightest:g}")
        if loss not in ("margin", "cross-entropy"):
            raise RequestError(f"expected a loss of margin, cross-entropy; got {loss!r}")
        self.budget = budget
        self.steps = steps
        self.restarts = restarts
        self.weights = weights
        self.lightest = lightest
        self.heaviest = heaviest
        self.step = step
        self.momentum = momentum
        self.loss = loss
        self.beyond = beyond

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]."""
        middle = (self.lightest * self.heaviest) ** 0.5
        places = [2 * place / (self.weights - 1) - 1 for place in range(self.weights)] if self.weights > 1 else [0.0]
        attempts = [
            Attempt(
                self._slope(problem, heading, middle * (self.heaviest / middle) ** place),
                stride(self.step, restart),
                "random" if restart else "image",
            )
            for restart, heading in enumerate(headings(problem, self.restarts))
            for place in places
        ]
        return descend(problem, self.budget, self.steps, attempts, self.momentum)

    def _slope(self, problem: Problem, heading: Tensor | None, weight: float) -> Slope:
        defence = defence_in(problem)

        def slope(seen: Seen, points: Tensor, rows: Tensor) -> Tensor:
            above = (seen.scores - defence.threshold) / defence.spread
            if self.loss == "cross-entropy":
                return slope_of(label_loss(problem, seen.logits, rows, heading) + weight * above, points)
            lead = label_margin(problem, seen.logits, rows, heading).clamp_min(-self.beyond)
            return slope_of(lead + weight * above.clamp_min(-self.beyond), points)

        return slope
