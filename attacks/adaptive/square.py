"""Square on the combined decision: a search without gradients for an image that is wrong and not flagged.

It needs no surrogate and no slope, so that it finds what gradients hide. Source of the search: Andriushchenko et al.,
"Square Attack: a Query-Efficient Black-Box Adversarial Attack via Random Search", 2020; the loss is ours: the right
label's lead as a share of its lead on the clean image, plus the score above the threshold in standard deviations of
clean images' scores, each counted until it is gone.
"""

import torch
from torch import Tensor

from attacks.adaptive.descent import defence_in
from attacks.methods.square import Square
from attacks.problem import Problem, rounded

LEAD = 0.05


class SquareEvasion:
    """Random squares, kept where label and score together come nearer to evading; an image that evades leaves."""

    def __init__(
        self, budget: float, queries: int = 5000, weight: float = 1.0, share: float = 0.8, lead: float = LEAD
    ) -> None:
        """An L-inf attack.

        Args:
            budget: largest change of a pixel, in [0, 1].
            queries: of network and detector for each image.
            weight: of the score beside the label.
            share: of the image's pixels in the first squares.
            lead: how far the wrong label is to lead, in logits.
        """
        self.budget = budget
        self.queries = queries
        self.weight = weight
        self.share = share
        self.lead = lead

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; where none evades, the one of the lowest loss."""
        defence = defence_in(problem)

        def lead_and_score(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            versions = rounded(points)
            seen = defence.see(problem.network.counted(versions, rows))
            wrong = problem.is_goal(seen.logits, rows)
            scores = seen.scores.double()
            asked = torch.ones_like(wrong)
            if defence.exact:  # the real detector is asked only where it would matter
                asked = wrong & (scores <= defence.threshold + 1e-3 * defence.spread)
            if asked.any():
                labels, real = defence.judge(problem.network.counted(versions[asked], rows[asked]))
                scores[asked], wrong[asked] = real.double(), problem.is_wanted(labels, rows[asked])
            return problem.margin(seen.logits, rows), scores, wrong

        with torch.no_grad():
            lead, _, _ = lead_and_score(problem.images, problem.all_rows())
        unit = lead.clamp_min(1e-3)

        def ask(_problem: Problem, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                lead, scores, wrong = lead_and_score(points, rows)
                above = scores - defence.threshold
                loss = (lead + self.lead).clamp_min(0) / unit[rows] + self.weight * above.clamp_min(0) / defence.spread
                return loss, wrong & (above <= -1e-6 * defence.spread)

        return rounded(Square(self.budget, self.queries, self.share, ask)(problem))
