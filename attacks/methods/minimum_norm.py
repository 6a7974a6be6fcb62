"""Attacks that seek the smallest change: batched, each image on its own, and alive after rounding to 8 bits.

torchattacks' C&W has no binary search and stops by the *sum* over the batch, so that a result depends on its
neighbours; its EAD stops likewise; its DeepFool walks image by image and ends so close to the boundary that rounding
undoes nearly all of its success. Here an image's best change is the smallest that fools the network *as it will be
stored*. Sources: Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017; Chen et al., "EAD:
Elastic-Net Attacks to Deep Neural Networks", 2018; Moosavi-Dezfooli et al., "DeepFool", 2016.
"""

import torch
from torch import Tensor

from attacks.problem import Problem, rounded

LENGTHS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 14.0, 20.0)
BISECTIONS = 3


class DeepFool:
    """Steps to the nearest linearised boundary until the label changes; an image fooled leaves.

    Only the boundaries to the few classes that come nearest in logits are looked at, as the paper does for many
    classes: each costs a backward pass, and the others are hardly ever the nearest.
    """

    def __init__(self, steps: int = 50, step_overshoot: float = 0.02, candidates: int = 3) -> None:
        """An L2 attack.

        Args:
            steps: at most this many linearisations.
            step_overshoot: how far beyond each linearised boundary a step goes, as a share of the step.
            candidates: classes beside its own that are looked at, at every step.
        """
        self.steps = steps
        self.step_overshoot = step_overshoot
        self.candidates = candidates

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; one that cannot be fooled comes back as far as it got."""
        return overshoot(problem, self.walk(problem, problem.images.clone(), problem.all_rows()))

    def walk(self, problem: Problem, points: Tensor, rows: Tensor) -> Tensor:
        """`points`, versions of the images at `rows`, moved just beyond the boundary."""
        active = torch.arange(len(rows), device=rows.device)
        for step in range(self.steps):
            if step > 0:  # asked without gradients first: they cost one pass for each class
                with torch.no_grad():
                    logits = problem.network(points[active], rows[active])
                active = active[~problem.is_goal(logits, rows[active])]
            if len(active) == 0:
                break
            change = self._to_nearest_boundary(problem, points[active], rows[active])
            points[active] = (points[active] + (1 + self.step_overshoot) * change).clamp(0, 1)
        return points

    def _to_nearest_boundary(self, problem: Problem, points: Tensor, rows: Tensor) -> Tensor:
        points = points.requires_grad_(True)
        logits = problem.network(points, rows)
        here = logits.gather(1, problem.labels[rows, None])
        if problem.targets is None:
            others = logits.detach().scatter(1, problem.labels[rows, None], float("-inf"))
            wanted = others.topk(min(self.candidates, logits.shape[1] - 1), dim=1).indices
        else:
            wanted = problem.targets[rows, None]
        gaps = logits.gather(1, wanted) - here
        nearest = torch.full_like(here[:, 0], float("inf")).detach()
        change = torch.zeros_like(points)
        for k in range(gaps.shape[1]):
            (gradient,) = torch.autograd.grad(gaps[:, k].sum(), [points], retain_graph=k + 1 < gaps.shape[1])
            with torch.no_grad():
                size = gradient.flatten(1).norm(dim=1)
                gap = gaps[:, k].abs() + 1e-6
                distance = torch.where(size > 0, gap / size, float("inf"))  # the right class has no gap and no slope
                nearer = distance < nearest
                nearest = torch.where(nearer, distance, nearest)
                step = (gap / size.clamp_min(1e-30) ** 2)[:, None, None, None] * gradient
                change = torch.where(nearer[:, None, None, None], step, change)
        return change.detach()


class CarliniWagner:
    """C&W-L2 with a binary search for the constant of each image; confidence 0.

    The steps go through pixels that are clipped to [0, 1] after each. The paper's change of variables (tanh) has no
    slope at black and white, and those are half of the pixels of some data sets. Adam's steps have about the same
    length in every value, so that the learning rate bounds from below how near to the image they stay, and a constant
    of 1 means something else for each network. Both therefore start from what the linearised network says: at distance
    `d = margin / |slope|`, the constant `2 d / |slope|` just reaches the boundary, and steps are a share of `d`. With
    such a beginning few long runs come nearer than many short ones; only an image that nothing fools gets more.
    """

    def __init__(
        self, steps: int = 60, searches: int = 2, tries: int = 5, start: float = 3.0, rate: float = 0.2,
        patience: float = 0.3,
    ) -> None:  # fmt: skip
        """An L2 attack.

        Args:
            steps: of Adam, for each constant, at most.
            searches: constants tried for each image.
            tries: constants tried for an image as long as none fools it.
            start: first constant, as a multiple of the linearised network's.
            rate: length of Adam's first steps as a share of the distance to the boundary; the last are a tenth.
            patience: share of the steps after which an image whose loss falls no more leaves, until the next constant.
        """
        self.steps = steps
        self.searches = searches
        self.tries = tries
        self.start = start
        self.rate = rate
        self.patience = patience

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; an image that cannot be fooled comes back as it is."""
        best = Best(problem, norm=2)
        margin, gradient = slope_of_margin(problem)
        slope = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        distance = (margin / slope).clamp(1 / 255, problem.images[0].numel() ** 0.5 / 4)
        constants = Constants(self.start * 2 * distance / slope)
        rows = problem.all_rows()
        for search in range(max(self.searches, self.tries)):
            if search >= self.searches:
                rows = torch.nonzero(best.exact.isinf()).flatten()
            if len(rows) == 0:
                break
            constants.learn(self._attempt(problem, rows, constants.now, distance, best))
            distance = torch.where(best.exact.isinf(), distance * 3, best.exact)
        return best.images()

    def _attempt(
        self, problem: Problem, rows: Tensor, constant: Tensor, distance: Tensor, best: "Best"
    ) -> Tensor:  # fmt: skip
        """One run of Adam on the images at `rows`; whether each image was fooled at any step, `(images,)`."""
        fooled = torch.zeros(len(problem), dtype=torch.bool, device=rows.device)
        origin = point = problem.images[rows]
        mean, square = torch.zeros_like(point), torch.zeros_like(point)
        rate = self.rate * distance / point[0].numel() ** 0.5
        lowest, stale = torch.full_like(constant, float("inf")), torch.zeros_like(constant)
        for step in range(self.steps):
            asked = point.detach().requires_grad_(True)
            margin = problem.margin(problem.network(asked, rows), rows)
            loss = (asked - origin).square().sum(dim=(1, 2, 3)) + constant[rows] * margin.clamp_min(0)
            (gradient,) = torch.autograd.grad(loss.sum(), [asked])
            with torch.no_grad():
                fooled[rows] |= margin < 0
                best.take(point, rows, margin)
                stale[rows] = torch.where(loss < 0.999 * lowest[rows], 0, stale[rows] + 1)
                lowest[rows] = torch.minimum(loss, lowest[rows])
                stay = stale[rows] < self.patience * self.steps
                if not stay.all():
                    rows, origin, point, mean, square, gradient = (
                        part[stay] for part in (rows, origin, point, mean, square, gradient)
                    )
                    if len(rows) == 0:
                        break
                mean = mean.lerp(gradient, 0.1)
                square = square.lerp(gradient.square(), 0.001)
                root = (square / (1 - 0.999 ** (step + 1))).sqrt().add_(1e-12)
                length = rate[rows, None, None, None] * 0.1 ** (step / max(self.steps - 1, 1)) / (1 - 0.9 ** (step + 1))
                point = (point - length * mean / root).clamp_(0, 1)
        return fooled


class Constants:
    """The binary search of C&W and EAD for each image's weight of the margin, ten times more while nothing fools.

    Attributes:
        now: the weights to try, `(images,)`.
    """

    def __init__(self, first: Tensor) -> None:
        """Weights to begin with, `(images,)`."""
        self.now = first
        self._low, self._high = torch.zeros_like(first), torch.full_like(first, float("inf"))

    def learn(self, fooled: Tensor) -> None:
        """Go on to the next weights, where these fooled `(images,)` or not."""
        self._high = torch.where(fooled, torch.minimum(self._high, self.now), self._high)
        self._low = torch.where(fooled, self._low, torch.maximum(self._low, self.now))
        self.now = torch.where(self._high.isinf(), self.now * 10, (self._low + self._high) / 2)


def slope_of_margin(problem: Problem) -> tuple[Tensor, Tensor]:
    """The margin of the clean images, `(images,)`, and its gradient, `(images, channels, height, width)`."""
    asked, rows = problem.images.clone().requires_grad_(True), problem.all_rows()
    margin = problem.margin(problem.network(asked, rows), rows)
    (gradient,) = torch.autograd.grad(margin.sum(), [asked])
    return margin.detach(), gradient


class Best:
    """For each image, the smallest change so far that fools: as it is, and as it will be stored."""

    def __init__(self, problem: Problem, norm: int) -> None:
        """Nothing yet: the clean images, infinitely far, by the L1 or L2 norm."""
        self._problem = problem
        self._norm = norm
        self._exact_points, self._stored_points = problem.images.clone(), problem.images.clone()
        far = torch.full_like(problem.images[:, 0, 0, 0], float("inf"))
        self.exact, self._stored = far, far.clone()

    def take(self, points: Tensor, rows: Tensor, margin: Tensor) -> None:
        """Keep those of `points` that fool and are nearer than what is kept.

        Args:
            points: versions of the images at `rows`, in [0, 1].
            rows: which images.
            margin: of the network on `points`, `(rows,)`.
        """
        fooled = margin < 0
        if not fooled.any():
            return
        points, rows = points[fooled], rows[fooled]
        distance = self._length(points, rows)
        nearer = distance < self.exact[rows]
        self.exact[rows[nearer]], self._exact_points[rows[nearer]] = distance[nearer], points[nearer]
        stored = rounded(points)
        distance = self._length(stored, rows)
        nearer = distance < self._stored[rows]
        if nearer.any():
            nearer[nearer.clone()] = self._problem.reached(points[nearer], rows[nearer])
            self._stored[rows[nearer]], self._stored_points[rows[nearer]] = distance[nearer], stored[nearer]

    def images(self) -> Tensor:
        """The best images in [0, 1]: the nearest that fools when stored, be it the nearest of all made longer."""
        rows = self._problem.all_rows()
        longer = overshoot(self._problem, self._exact_points)
        fooled = self._problem.reached(longer, rows)
        prefer = (fooled & (self._length(rounded(longer), rows) < self._stored)) | self._stored.isinf()
        return torch.where(prefer[:, None, None, None], longer, self._stored_points)

    def _length(self, points: Tensor, rows: Tensor) -> Tensor:
        length: Tensor = (points - self._problem.images[rows]).flatten(1).norm(p=self._norm, dim=1)
        return length


def overshoot(problem: Problem, attacked: Tensor) -> Tensor:
    """Lengthen each change by as little as makes it reach the goal after rounding to 8 bits.

    The first of `LENGTHS` that does is refined by bisection.

    Returns:
        The lengthened images; the given ones where no length reaches it.
    """
    images, result = problem.images, attacked.clone()
    waiting = problem.all_rows()
    short = torch.ones_like(images[:, 0, 0, 0])
    enough = torch.full_like(short, float("inf"))

    def at(length: Tensor, rows: Tensor) -> Tensor:
        return (images[rows] + length[rows, None, None, None] * (attacked[rows] - images[rows])).clamp(0, 1)

    for length in LENGTHS:
        tried = torch.full_like(short, length)
        longer = at(tried, waiting)
        won = problem.reached(longer, waiting)
        result[waiting[won]], enough[waiting[won]] = longer[won], length
        waiting = waiting[~won]
        short[waiting] = length
        if len(waiting) == 0:
            break
    rows = torch.nonzero(~enough.isinf() & (enough > 1)).flatten()
    for _ in range(BISECTIONS):
        if len(rows) == 0:
            break
        middle = (short + enough) / 2
        longer = at(middle, rows)
        won = problem.reached(longer, rows)
        result[rows[won]], enough[rows[won]] = longer[won], middle[rows[won]]
        short[rows[~won]] = middle[rows[~won]]
    return result
