"""Attacks of other libraries, held to the same rules as ours.

torchattacks 3.5.1 gives FAB and OnePixel, which are not worth writing again. OnePixel, which draws random numbers,
gets one image at a time, with the global generators seeded for that image and put back afterwards. Their success masks,
their defaults and `save`, which rewrites its file at every batch, are not used.

For HopSkipJump and a fast minimum-norm attack the choice was foolbox 3.3.4 or adv-lib 0.2.8 (adversarial-library):

* maintenance: adv-lib released in 2026, foolbox last in March 2024, but finished rather than broken: it runs on
  current torch and NumPy, with one deprecation warning of SciPy's at import;
* licence: BSD-3 and MIT, both fine;
* pins: neither pins anything to an exact version;
* size: foolbox brings eagerpy, GitPython and requests, about 3 MB; adv-lib brings visdom, and with it tornado,
  jsonpatch and websockets, to draw curves that nobody here looks at;
* what they have: adv-lib has no attack that sees decisions only. foolbox has HopSkipJump, Boundary and DDN.

So foolbox, which has both, and adv-lib only beside it in `benchmarks/attacks_vs_peers.py`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.draws import Draws
from attacks.methods.gradient import project
from attacks.methods.minimum_norm import overshoot
from attacks.problem import Problem, rounded
from detector.errors import RequestError

BATCH = 500  # random directions about which HopSkipJump asks at once


class Seen(nn.Module):
    """The network as a library sees it: it takes points, and knows which images they are versions of."""

    def __init__(self, problem: Problem, rows: Tensor) -> None:
        """For a library that attacks the images at `rows`: either all at once, or one with any number of versions."""
        super().__init__()
        self._problem = problem
        self._rows = rows
        # Libraries ask a network's parameters for its device.
        self.place = nn.Parameter(torch.empty(0, device=rows.device), requires_grad=False)
        self.eval()

    def forward(self, points: Tensor) -> Tensor:
        """Images in [0, 1] -> logits."""
        rows = self._rows if len(points) == len(self._rows) else self._rows[:1].expand(len(points))
        assert len(points) == len(self._rows) or len(self._rows) == 1, (len(points), len(self._rows))
        return self._problem.network(points.to(self._problem.images.dtype), rows).to(points.dtype)


class OneByOne:
    """An attack of torchattacks, one image at a time, with its randomness seeded for that image."""

    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        """The attack that `make` gives for a network."""
        self.make = make

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; those that do not reach the goal come back as the library left them."""
        result = problem.images.clone()
        for row in problem.all_rows().split(1):
            attack = self.make(Seen(problem, row))
            labels = problem.labels[row]
            if problem.targets is not None:
                attack.set_mode_targeted_by_label(quiet=True)
                labels = problem.targets[row]
            with seeded(problem.draws, int(row)):
                result[row] = attack(problem.images[row].clone(), labels).detach().to(result.dtype)
        return result


def onepixel(pixels: int, steps: int, population: int) -> OneByOne:
    """OnePixel (Su et al., "One Pixel Attack for Fooling Deep Neural Networks", 2019)."""
    return OneByOne(
        lambda network: _import_torchattacks().OnePixel(network, pixels=pixels, steps=steps, popsize=population)
    )


def fab_towards(problem: Problem, rows: Tensor, rank: int, budget: float, steps: int, result: Tensor) -> Tensor:
    """FAB towards one wrong class for the images at `rows`, as AutoAttack runs it: from the image, nothing random.

    Args:
        problem: what is attacked.
        rows: images that take part.
        rank: which class: 1 for the likeliest wrong one.
        budget: largest change of a pixel, in [0, 1].
        steps: linearisations.
        result: where the attacked images that fool within the budget go.

    Returns:
        The rows that it did not fool.
    """
    attack = _import_torchattacks().FAB(Seen(problem, rows), norm="Linf", eps=budget, steps=steps, multi_targeted=True)
    attack.target_class = 1 + rank
    origin = problem.images[rows]
    points = attack.attack_single_run_targeted(origin, problem.labels[rows]).to(origin.dtype)
    inside = (points - origin).flatten(1).abs().amax(dim=1) <= budget + 1e-6
    points = project(points, origin, "linf", budget)
    won = inside & problem.reached(points, rows)
    result[rows[won]] = points[won]
    return rows[~won]


class DDN:
    """foolbox's DDN; L2. It draws at random only where a gradient has vanished, here the same numbers in every run.

    Not its FMN: in 3.3.4 `L2FMNAttack.project` divides a norm by itself, so that it never shortens anything, and
    `LInfFMNAttack` comes to rest on the boundary of a linear network, not beyond it. Source: Rony et al., "Decoupling
    Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and Defenses", 2019.
    """

    def __init__(self, steps: int = 100) -> None:
        """An attack with a gradient of each image for each of `steps`; below 60 it has no time to come near."""
        self.steps = steps

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; one that cannot be fooled comes back as it is."""
        rows = problem.all_rows()
        attack = import_foolbox().attacks.DDNAttack(steps=self.steps)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            points = attack.run(_model(problem, rows), problem.images.clone(), _criterion(problem, rows))
        return overshoot(problem, points.detach())


class HopSkipJump:
    """foolbox's HopSkipJump (Chen et al., 2020), which sees labels only; untargeted; one image at a time.

    The library looks for starting points with random numbers that depend on the batch, searches the boundary until the
    last image is done, and asks the network for one random direction at a time: the starts are found here, and all
    directions of an image are asked about together.
    """

    untargeted = True

    def __init__(self, steps: int = 20, trials: int = 100) -> None:
        """An attack.

        Args:
            steps: estimates of the boundary's direction; the k-th takes 100 times the root of k queries.
            trials: random images tried as a start; an image for which none is wrong stays as it is.
        """
        self.steps = steps
        self.trials = trials

    def __call__(self, problem: Problem) -> Tensor:
        """The attacked images in [0, 1]; one without a starting point comes back as it is."""
        result = problem.images.clone()
        for row in problem.all_rows().split(1):
            start = self._start(problem, row)
            if start is None:
                continue
            attack = import_foolbox().attacks.HopSkipJumpAttack(steps=self.steps)
            # Shadows the method: the same estimate, from one question instead of one for each direction.
            attack.approximate_gradients = _DirectionAtBoundary(problem, row)
            with seeded(problem.draws, int(row)):
                found = attack.run(
                    _model(problem, row), problem.images[row], _criterion(problem, row), starting_points=start
                )
            result[row] = found.detach()
        return overshoot(problem, result)

    def _start(self, problem: Problem, row: Tensor) -> Tensor | None:
        """A random image that reaches the goal also when rounded; None if none was found."""
        for _ in range(self.trials):
            noise = problem.draws.uniform(row, *problem.images.shape[1:])
            # From near the image to pure noise: networks that give all noise one label are wrong somewhere between.
            noise = torch.lerp(problem.images[row], noise, problem.draws.uniform(row, 1, 1, 1).sqrt())
            if problem.reached(noise, row).all():
                return rounded(noise)
        return None


class _DirectionAtBoundary:
    """HopSkipJump's estimate of the boundary's normal: the mean of random directions, signed by what they lead to."""

    def __init__(self, problem: Problem, row: Tensor) -> None:
        self._problem = problem
        self._row = row

    def __call__(self, _is_adversarial: Any, points: Any, steps: int, delta: Any) -> Any:
        point, length = points.raw, delta.raw
        noise = torch.randn(steps, *point.shape[1:], dtype=point.dtype, device=point.device)
        noise /= noise.flatten(1).norm(dim=1)[:, None, None, None] + 1e-12
        asked = (point + length * noise).clamp(0, 1)
        rows = self._row.expand(steps)
        with torch.no_grad():
            parts = zip(asked.split(BATCH), rows.split(BATCH), strict=True)
            won = torch.cat([self._problem.is_goal(self._problem.network(part, part_rows), part_rows)
                             for part, part_rows in parts])  # fmt: skip
        signs = torch.where(won, 1.0, -1.0).to(point.dtype)
        if signs.mean().abs() < 1:
            signs = signs - signs.mean()
        direction = (signs[:, None, None, None] * (asked - point)).mean(dim=0, keepdim=True)
        return type(points)(direction / (direction.norm() + 1e-12))


@contextmanager
def seeded(draws: Draws, row: int) -> Iterator[None]:
    """Global generators of torch and NumPy seeded for one image, and as before afterwards."""
    seed = int(torch.randint(2**31 - 1, (), generator=draws.of(row)))
    before = np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before)


def _import_torchattacks() -> Any:
    """torchattacks, which no extra can hold: it pins a `requests` with known faults."""
    try:
        import torchattacks
    except ModuleNotFoundError as error:
        if error.name != "torchattacks":
            raise
        raise RequestError(
            "expected the package torchattacks for this attack, got none; pip install --no-deps torchattacks==3.5.1"
        ) from None
    return torchattacks


def import_foolbox() -> Any:
    """foolbox, which costs a second to import and asks SciPy for a name that it is giving up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import foolbox
    return foolbox


def _model(problem: Problem, rows: Tensor) -> Any:
    return import_foolbox().PyTorchModel(Seen(problem, rows), bounds=(0, 1), device=rows.device)


def _criterion(problem: Problem, rows: Tensor) -> Any:
    foolbox, ep = import_foolbox(), __import__("eagerpy")
    if problem.targets is None:
        return foolbox.Misclassification(ep.astensor(problem.labels[rows]))
    return foolbox.TargetedMisclassification(ep.astensor(problem.targets[rows]))
