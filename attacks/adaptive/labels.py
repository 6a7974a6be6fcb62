"""Which wrong label a descent heads for, and how far an image is from it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.adaptive.descent import defence_in
from attacks.problem import Problem, margin_over_others


def headings(problem: Problem, restarts: int) -> list[Tensor | None]:
    """The label that each restart heads for, `(images,)`; None where it heads away from the right one.

    The first restart and every second one after it head away from the right label, those between to the likeliest
    wrong label, the next likeliest, and so on (Gowal et al., "An Alternative Surrogate Loss for PGD-based Adversarial
    Testing", 2019). With targets, all head for them.
    """
    if problem.targets is not None:
        return [problem.targets] * restarts
    if restarts < 2:
        return [None] * restarts
    rows = problem.all_rows()
    with torch.no_grad():
        logits = defence_in(problem).see(problem.network.counted(problem.images, rows)).logits
    wrong = logits.scatter(1, problem.labels[:, None], float("-inf"))
    ranked = wrong.argsort(dim=1, descending=True)[:, : logits.shape[1] - 1]
    return [ranked[:, (restart // 2) % ranked.shape[1]] if restart % 2 else None for restart in range(restarts)]


def label_loss(problem: Problem, logits: Tensor, rows: Tensor, heading: Tensor | None) -> Tensor:
    """Small where the label is wrong (and is the one headed for), `(rows,)`."""
    if heading is None:
        return -F.cross_entropy(logits, problem.labels[rows], reduction="none")
    return F.cross_entropy(logits, heading[rows], reduction="none")


def label_margin(problem: Problem, logits: Tensor, rows: Tensor, heading: Tensor | None) -> Tensor:
    """How far the label is from being wrong (and the one headed for), in logits, `(rows,)`; below zero where it is."""
    if heading is None:
        return margin_over_others(logits, problem.labels[rows])
    return -margin_over_others(logits, heading[rows])
