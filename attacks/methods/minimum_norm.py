"""Attacks that seek the smallest change: batched, each image on its own, and alive after rounding to 8 bits.

torchattacks' C&W has no binary search and stops by the *sum* over the batch, so that a result depends on its
neighbours; its EAD stops likewise; its DeepFool walks image by image and ends so close to the boundary that rounding
undoes nearly all of its success. Here an image's best change is the smallest that fools the network *as it will be
stored*. Sources: Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017; Chen et al., "EAD:
Elastic-Net Attacks to Deep Neural Networks", 2018; Moosavi-Dezfooli et al., "DeepFool", 2016.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attacks.problem import Problem, rounded

LENGTHS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 14.0, 20.0)
BISECTIONS = 3
RIVALS = 3.0  # times the gap to the likeliest wrong class: a class further behind is hardly ever nearer


class DeepFool:
    """Steps to the nearest linearised boundary until the label changes; an image fooled leaves.

    Only the boundaries to the few classes that come nearest in logits are looked at, as the paper does for many
    classes: each costs a backward pass, and the others are hardly ever the nearest. After the first step the likeliest
    wrong class is nearly always far ahead of all others; it is then the only one.
    """

    def __init__(self, steps: int = 50, step_overshoot: float = 0.02, candidates: int = 3) -> None:
        """An L2 attack.

        Args:
            steps: at most this many linearisations.
            step_overshoot: how far beyond each linearised boundary a step goes, as a share of the step.
            candidates: classes beside its own that are looked at, where the second is near to the first.
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
                staying = ~problem.is_goal(logits, rows[active])
                active, logits = active[staying], logits[staying]
            if len(active) == 0:
                break
            alone = torch.zeros_like(active, dtype=torch.bool)
            if step > 0 and problem.targets is None:
                alone = _has_no_rival(logits, problem.labels[rows[active]])
            for part, candidates in ((active[alone], 1), (active[~alone], self.candidates)):
                if len(part) > 0:
                    change = self._to_nearest_boundary(problem, points[part], rows[part], candidates)
                    points[part] = (points[part] + (1 + self.step_overshoot) * change).clamp(0, 1)
        return points

    def _to_nearest_boundary(self, problem: Problem, points: Tensor, rows: Tensor, candidates: int) -> Tensor:
        points = points.requires_grad_(True)
        logits = problem.network(points, rows)
        here = logits.gather(1, problem.labels[rows, None])
        if problem.targets is None:
            others = logits.detach().scatter(1, problem.labels[rows, None], float("-inf"))
            wanted = others.topk(min(candidates, logits.shape[1] - 1), dim=1).indices
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


def _has_no_rival(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the likeliest wrong class is far nearer in logits than every other one, `(images,)`."""
    gaps = logits.gather(1, labels[:, None]) - logits.scatter(1, labels[:, None], float("-inf"))
    nearest = gaps.topk(min(2, logits.shape[1] - 1), dim=1, largest=False).values
    return nearest[:, -1] > RIVALS * nearest[:, 0]


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
        best, clean = Best(problem, norm=2), slope_of_margin(problem)
        margin, gradient = clean
        best.take(problem.images, problem.all_rows(), margin)
        slope = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        distance = (margin / slope).clamp(1 / 255, problem.images[0].numel() ** 0.5 / 4)
        constants = Constants(self.start * 2 * distance / slope)
        rows = problem.all_rows()
        for search in range(max(self.searches, self.tries)):
            if search >= self.searches:
                rows = torch.nonzero(best.exact.isinf()).flatten()
            if len(rows) == 0:
                break
            constants.learn(self._attempt(problem, rows, constants.now, distance, clean, best))
            best.settle()
            distance = torch.where(best.exact.isinf(), distance * 3, best.exact)
        return best.images()

    def _attempt(
        self, problem: Problem, rows: Tensor, constant: Tensor, distance: Tensor, clean: tuple[Tensor, Tensor],
        best: "Best",
    ) -> Tensor:  # fmt: skip
        """One run of Adam on the images at `rows`; whether each image was fooled at any step, `(images,)`.

        Every run begins at the clean image, whose margin and slope are known, and no gradient is taken of its last
        point, from which no step follows: `steps` forward passes and one backward pass less.
        """
        fooled = clean[0] < 0
        origin = point = problem.images[rows]
        margin, slope = clean[0][rows], clean[1][rows]
        mean, square = torch.zeros_like(point), torch.zeros_like(point)
        rate = self.rate * distance / point[0].numel() ** 0.5
        lowest, stale = constant * clean[0].clamp_min(0), torch.zeros_like(constant)
        for step in range(self.steps):
            with torch.no_grad():
                pull = torch.where(margin > 0, constant[rows], 0)[:, None, None, None]
                gradient = 2 * (point - origin) + pull * slope
                mean = mean.lerp(gradient, 0.1)
                square = square.lerp(gradient.square(), 0.001)
                root = (square / (1 - 0.999 ** (step + 1))).sqrt().add_(1e-12)
                length = rate[rows, None, None, None] * 0.1 ** (step / max(self.steps - 1, 1)) / (1 - 0.9 ** (step + 1))
                point = (point - length * mean / root).clamp_(0, 1)
            last = step == self.steps - 1
            asked = point.detach().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                ahead = problem.margin(problem.network(asked, rows), rows)
            margin = ahead.detach()
            fooled[rows] |= margin < 0
            best.take(point, rows, margin)
            loss = (point - origin).square().sum(dim=(1, 2, 3)) + constant[rows] * margin.clamp_min(0)
            stale[rows] = torch.where(loss < 0.999 * lowest[rows], 0, stale[rows] + 1)
            lowest[rows] = torch.minimum(loss, lowest[rows])
            stay = stale[rows] < self.patience * self.steps
            if last or not stay.any():
                break
            with problem.network.only(rows[stay]):
                (slope,) = torch.autograd.grad(ahead[stay].sum(), [asked])
            if not stay.all():
                rows, origin, point, mean, square, margin, slope = (
                    part[stay] for part in (rows, origin, point, mean, square, margin, slope)
                )
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
    """For each image, the smallest change so far that fools: as it is, and as it will be stored.

    Whether a change survives the rounding takes a pass. So those that might wait, in 8 bits, and are asked about from
    the nearest on, until one does: on its way towards an image an attack sees many that a nearer one makes useless.
    """

    def __init__(self, problem: Problem, norm: int) -> None:
        """Nothing yet: the clean images, infinitely far, by the L1 or L2 norm."""
        self._problem = problem
        self._norm = norm
        self._exact_points, self._stored_points = problem.images.clone(), problem.images.clone()
        far = torch.full_like(problem.images[:, 0, 0, 0], float("inf"))
        self.exact, self._stored = far, far.clone()
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

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
        levels = stored[nearer].mul(255).round_().to(torch.uint8)
        self._waiting.append((rows[nearer], levels, distance[nearer]))

    def settle(self) -> None:
        """Ask about what waits; to be called now and then, so that not too much does."""
        if not self._waiting:
            return
        rows, levels, distance = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        order = distance.argsort(stable=True)
        while len(order) > 0:
            order = order[distance[order] < self._stored[rows[order]]]
            # The first of each image: stable, so that it is the nearest.
            of_image, place = rows[order].sort(stable=True)
            first = torch.ones_like(of_image, dtype=torch.bool)
            first[1:] = of_image[1:] != of_image[:-1]
            asked = order[place[first]]
            points = levels[asked].to(self._stored_points) / 255
            kept = asked[self._problem.reached(points, rows[asked])] if len(asked) > 0 else asked
            self._stored[rows[kept]] = distance[kept]
            self._stored_points[rows[kept]] = levels[kept].to(self._stored_points) / 255
            order = order[place[~first].sort().values]

    def images(self) -> Tensor:
        """The best images in [0, 1]: the nearest that fools when stored, be it the nearest of all made longer.

        As it is, the nearest of all was asked about; made longer it is of use only as long as it stays nearer than the
        nearest that fools when stored.
        """
        self.settle()

        def nearer(points: Tensor, rows: Tensor) -> Tensor:
            closer: Tensor = self._length(rounded(points), rows) < self._stored[rows]
            return closer

        rows = torch.nonzero(~self.exact.isinf()).flatten()
        longer, won = lengthened(self._problem, self._exact_points, rows, LENGTHS[1:], nearer)
        result = self._stored_points.clone()
        rows = torch.nonzero(won).flatten()
        rows = rows[nearer(longer[rows], rows)]
        result[rows] = longer[rows]
        return result

    def _length(self, points: Tensor, rows: Tensor) -> Tensor:
        length: Tensor = (points - self._problem.images[rows]).flatten(1).norm(p=self._norm, dim=1)
        return length


def overshoot(problem: Problem, attacked: Tensor) -> Tensor:
    """Lengthen each change by as little as makes it reach the goal after rounding to 8 bits.

    Returns:
        The lengthened images; the given ones where no length reaches it.
    """
    return lengthened(problem, attacked, problem.all_rows(), LENGTHS)[0]


def lengthened(
    problem: Problem, attacked: Tensor, rows: Tensor, lengths: Sequence[float],
    worth: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The changes of the images at `rows`, each as little longer as makes it reach the goal after rounding to 8 bits.

    The first of `lengths` that does is refined by bisection.

    Args:
        problem: what is attacked.
        attacked: changed images in [0, 1], `(images, channels, height, width)`.
        rows: which of them.
        lengths: to try, rising from 1.
        worth: points and their rows -> whether the network is to be asked about them, `(rows,)`; an image one of whose
            versions is not worth it is not made any longer. None for all.

    Returns:
        The lengthened images, those given where no length reaches the goal, and for which one does, `(images,)`.
    """
    images, result = problem.images, attacked.clone()
    short = torch.ones_like(images[:, 0, 0, 0])
    enough = torch.full_like(short, float("inf"))

    def at(length: Tensor, rows: Tensor) -> Tensor:
        return (images[rows] + length[rows, None, None, None] * (attacked[rows] - images[rows])).clamp(0, 1)

    waiting = rows
    for length in lengths:
        tried = torch.full_like(short, length)
        if worth is not None:
            waiting = waiting[worth(at(tried, waiting), waiting)]
        if len(waiting) == 0:
            break
        longer = at(tried, waiting)
        won = problem.reached(longer, waiting)
        result[waiting[won]], enough[waiting[won]] = longer[won], length
        waiting = waiting[~won]
        short[waiting] = length
    reached = ~enough.isinf()
    rows = torch.nonzero(reached & (enough > 1)).flatten()
    for _ in range(BISECTIONS):
        if len(rows) == 0:
            break
        middle = (short + enough) / 2
        longer = at(middle, rows)
        won = problem.reached(longer, rows)
        result[rows[won]], enough[rows[won]] = longer[won], middle[rows[won]]
        short[rows[~won]] = middle[rows[~won]]
    return result, reached
