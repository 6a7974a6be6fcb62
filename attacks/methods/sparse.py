"""Attacks that change few values or little in sum: EAD (L1), SparseFool and JSMA (L0), batched.

torchattacks' EAD stops by the sum over the batch; its JSMA sets the target to (label + 1) mod 10 whatever the classes,
takes a gradient for each class where two do, and holds a matrix of all pairs of values for each image in turn.
Sources: Chen et al., "EAD: Elastic-Net Attacks to Deep Neural Networks via Adversarial Examples", 2018; Papernot et
al., "The Limitations of Deep Learning in Adversarial Settings", 2016; Modas et al., "SparseFool: a Few Pixels Make a
Big Difference", 2019.
"""

import torch
from torch import Tensor

from attacks.methods.minimum_norm import Best, Constants, DeepFool, slope_of_margin
from attacks.problem import Problem
from detector.errors import RequestError

CANDIDATES = 64
NEAR = 1.25  # times the best so far: a little longer may be what rounding lets live


class ElasticNet:
    """EAD: FISTA on the C&W margin with an elastic-net penalty, the constant searched for each image, judged by L1.

    FISTA looks ahead of where it is, and only where it is has been shrunk: what it looks at moves values that the
    shrinking had put back, and is longer. So the shrunk image is asked about too, by a forward pass wherever it is
    about as near as the best so far; and of the nearest, changes that it does not need are taken back.
    """

    def __init__(
        self, steps: int = 50, searches: int = 5, start: float = 10.0, learning_rate: float = 0.01, beta: float = 0.01
    ) -> None:
        """An L1 attack.

        Args:
            steps: of FISTA, for each constant.
            searches: constants tried for each image.
            start: first constant, as a multiple of the one at which the steepest value begins to move.
            learning_rate: of the steps, falling as a square root.
            beta: what each step takes off every change: the weight of the L1 length beside the squared L2 length.
        """
        self.steps = steps
        self.searches = searches
        self.start = start
        self.learning_rate = learning_rate
        self.beta = beta

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; an image that cannot be fooled comes back as it is."""
        best = Best(problem, norm=1)
        steepest = slope_of_margin(problem)[1].flatten(1).abs().amax(dim=1).clamp_min(1e-12)
        constants = Constants(self.start * self.beta / (self.learning_rate * steepest))
        for _ in range(self.searches):
            constants.learn(self._attempt(problem, constants.now, best))
            best.settle()
        return fewest(problem, best.images())

    def _attempt(self, problem: Problem, constant: Tensor, best: Best) -> Tensor:
        """One run of FISTA with these constants; whether each image was fooled at any step, `(images,)`."""
        images, rows = problem.images, problem.all_rows()
        fooled = torch.zeros_like(rows, dtype=torch.bool)
        kept = ahead = images
        for step in range(self.steps):
            asked = ahead.detach().requires_grad_(True)
            margin = problem.margin(problem.network(asked, rows), rows)
            (gradient,) = torch.autograd.grad((constant * margin.clamp_min(0)).sum(), [asked])
            with torch.no_grad():
                fooled |= margin < 0
                best.take(ahead, rows, margin)
                length = self.learning_rate * (1 - step / self.steps) ** 0.5
                change = ahead - length * (gradient + 2 * (ahead - images)) - images
                shrunk = (images + change.sign() * (change.abs() - self.beta).clamp_min(0)).clamp(0, 1)
                ahead = (shrunk + step / (step + 3) * (shrunk - kept)).clamp(0, 1)
                kept = shrunk
                nearer = rows[(kept - images).abs().sum(dim=(1, 2, 3)) < NEAR * best.exact]
                if len(nearer) > 0:
                    margin = problem.margin(problem.network(kept[nearer], nearer), nearer)
                    fooled[nearer] |= margin < 0
                    best.take(kept[nearer], nearer, margin)
        return fooled


class SparseFool:
    """DeepFool finds the nearest boundary, and a greedy walk reaches it by as few values as it can; L0.

    torchattacks' version goes image by image and coordinate by coordinate, and asks NumPy for what it is giving up.
    """

    def __init__(self, steps: int = 10, reach: float = 3.0) -> None:
        """An L0 attack.

        Args:
            steps: linearisations, at most.
            reach: how far the boundary is taken to lie, as a multiple of DeepFool's change.
        """
        self.steps = steps
        self.reach = reach

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; one that cannot be fooled comes back as far as it got."""
        result, rows = problem.images.clone(), problem.all_rows()
        deepfool = DeepFool()
        for step in range(self.steps + 1):
            rows = rows[~problem.reached(result[rows], rows)]
            if len(rows) == 0 or step == self.steps:
                break
            start = result[rows]
            beyond = deepfool.walk(problem, start.clone(), rows)
            asked = (start + self.reach * (beyond - start)).requires_grad_(True)
            margin = problem.margin(problem.network(asked, rows), rows)
            (slope,) = torch.autograd.grad(margin.sum(), [asked])
            result[rows] = _to_plane(start, -slope, asked.detach(), start == problem.images[rows], 2.0**step)
        return fewest(problem, result)


def fewest(problem: Problem, points: Tensor) -> Tensor:
    """`points` with as many of their changes taken back, least helpful first, as leaves the goal reached; by halving.

    SparseFool reaches past the boundary on purpose, and pays for it in values that it need not have changed.
    """
    rows = problem.all_rows()
    rows = rows[problem.reached(points, rows)]
    if len(rows) == 0:
        return points
    asked = points[rows].requires_grad_(True)
    margin = problem.margin(problem.network(asked, rows), rows)
    (slope,) = torch.autograd.grad(margin.sum(), [asked])
    change = (points[rows] - problem.images[rows]).flatten(1)
    helpful = (-slope.flatten(1) * change).masked_fill(change == 0, float("-inf"))
    rank = helpful.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    low, high = torch.zeros_like(rows), (change != 0).sum(dim=1)
    result = points.clone()
    for _ in range(int(change.shape[1]).bit_length()):
        middle = (low + high) // 2
        kept = problem.images[rows] + (change * (rank < middle[:, None])).view_as(asked)
        won = problem.reached(kept, rows)
        result[rows[won]] = kept[won]
        high, low = torch.where(won, middle, high), torch.where(won, low, middle + 1).minimum(high)
    return result


def _to_plane(start: Tensor, normal: Tensor, beyond: Tensor, free: Tensor, push: float) -> Tensor:
    """From `start` to the plane through `beyond` along `normal`, or past it, in as few values as it takes.

    The steepest values go first, each to the end of its range: a part of the way would count as much. All at once, by
    a running sum. Only the values that are `free` move: those changed before would go to and fro.
    What the plane says is needed is multiplied by `push`: a whole value's way leaves where the plane holds.
    """
    origin, steep, way = start.flatten(1), normal.flatten(1), (beyond - start).flatten(1)
    ahead = (steep * way).sum(dim=1, keepdim=True)
    steep = torch.where(ahead > 0, steep, way)  # a bent boundary can turn its back: then along the way itself
    needed = torch.where(ahead > 0, ahead, (way * way).sum(dim=1, keepdim=True)) * push * (1 + 1e-3) + 1e-6
    room = torch.where(steep > 0, 1 - origin, origin) * free.flatten(1)
    order = (steep.abs() * (room > 0)).argsort(dim=1, descending=True, stable=True)
    gain = (steep.abs() * room).gather(1, order)
    before = gain.cumsum(dim=1) - gain
    taken = (needed - before).clamp_min(0).minimum(gain)
    moves = torch.zeros_like(gain).scatter(1, order, (taken > 0).to(gain.dtype))
    return (origin + moves * room * steep.sign()).view_as(start)


class SaliencyMap:
    """JSMA: pairs of values go to the end of their range, those that help the target most and the others least."""

    def __init__(self, share: float = 0.1, up: bool = True) -> None:
        """An L0 attack towards a target, which the recipe chooses.

        Args:
            share: of the values that may change, in (0, 1].
            up: whether values go to 1 rather than to 0.
        """
        self.share = share
        self.up = up

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; those that do not reach their target come back as far as they got."""
        if problem.targets is None:
            raise RequestError("expected a target for JSMA, which knows no other goal; got none")
        result, rows = problem.images.clone(), problem.all_rows()
        values = result[0].numel()
        changeable = (result < 0.99 if self.up else result > 0.01).flatten(1)
        for step in range(max(int(self.share * values / 2), 1) + 1):
            asked = result[rows].requires_grad_(True)
            logits = problem.network(asked, rows)
            stay = ~problem.is_goal(logits, rows)
            if step == max(int(self.share * values / 2), 1) or not stay.any():
                break
            wanted = logits.gather(1, problem.targets[rows, None])[stay].sum()
            with problem.network.only(rows[stay]):
                (towards,) = torch.autograd.grad(wanted, [asked], retain_graph=True)
                (overall,) = torch.autograd.grad(logits[stay].sum(), [asked])
            sign = 1.0 if self.up else -1.0
            towards, away = sign * towards[stay].flatten(1), sign * (overall - towards)[stay].flatten(1)
            rows = rows[stay]
            pairs, found = _best_pairs(towards, away, changeable[rows])
            rows, pairs = rows[found], pairs[found]
            if len(rows) == 0:
                break
            flat = result[rows].flatten(1).scatter(1, pairs, 1.0 if self.up else 0.0)
            result[rows] = flat.view(-1, *result.shape[1:])
            changeable[rows[:, None], pairs] = False
        return result


def _best_pairs(towards: Tensor, away: Tensor, changeable: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of values of each row with the greatest saliency, `(rows, 2)`, and whether there is one.

    Saliency is `-(a_p + a_q) (b_p + b_q)` where the sum for the target is above and that for the others below zero.
    Looked for among the values that are best by either sum or by their product, instead of among all pairs.
    """
    count = min(CANDIDATES, towards.shape[1])
    scores = (towards, -away, towards.clamp_min(0) * (-away).clamp_min(0))
    chosen = torch.cat([s.masked_fill(~changeable, float("-inf")).topk(count, dim=1).indices for s in scores], dim=1)
    allowed = changeable.gather(1, chosen)
    a, b = towards.gather(1, chosen), away.gather(1, chosen)
    sum_a, sum_b = a[:, :, None] + a[:, None, :], b[:, :, None] + b[:, None, :]
    fits = (sum_a > 0) & (sum_b < 0) & allowed[:, :, None] & allowed[:, None, :]
    fits &= chosen[:, :, None] != chosen[:, None, :]
    saliency = (-sum_a * sum_b).masked_fill(~fits, float("-inf")).flatten(1)
    value, place = saliency.max(dim=1)
    side = chosen.shape[1]
    pairs = torch.stack([chosen.gather(1, (place // side)[:, None]), chosen.gather(1, (place % side)[:, None])], dim=1)
    return pairs.squeeze(2), value > float("-inf")
