"""How much a detector withstands an attacker who knows all of it: robust accuracy at each budget."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.adaptive.defence import Defence
from attacks.adaptive.suite import ADAPTIVE, ADAPTIVE_DEEP
from attacks.craft import craft
from attacks.evaluation.protocol import Trial
from attacks.recipes import RECIPES, Recipe, Setting
from attacks.selection import rightly_classified
from detector.batches import device_of, to_tensor
from detector.datasets import ImageSet
from detector.network.decouple import GatedNet
from detector.scoring.thresholds import clopper_pearson
from detector.workers import IN_PROCESS, Workers

ANY = "any of them"
SAID = ("steps", "restarts", "weights", "queries")  # how long an attack searches
# Those that take a number of steps; the others, which see scores or decisions only, keep their own settings.
STEPPED = {recipe.name.removesuffix("-deep") for recipe in ADAPTIVE_DEEP}


@dataclass(frozen=True, slots=True)
class Withstood:
    """One attack at one budget.

    Attributes:
        attack: its name, or `ANY`: an image counts as lost if any of the attacks finds a way.
        budget: L-inf, in grey levels of 255; what succeeded within a smaller one counts here as well.
        images: clean images attacked, of the first of the test split that the network gets right.
        tried_by_all: how many of them every attack of the row was given.
        settings: how long the attack searches: its steps, its restarts, ...
        robust: share of all images, those it gets wrong counted as lost, that are not both misread and unflagged.
        low: lower end of its 95 % interval.
        high: upper end.
        without_detector: the same share with the detector off: images that neither plain PGD nor any of the attacks
            makes the network misread. In the row `ANY` alone: one attack is not to be held against all of them.
        exact: whether the attacker had the detector's own gradient, not an imitation's.
    """

    attack: str
    budget: int
    images: int
    tried_by_all: int
    settings: str
    robust: float
    low: float
    high: float
    without_detector: float | None
    exact: bool

    @property
    def added(self) -> float | None:
        """What the detector adds, in points of robust accuracy."""
        return None if self.without_detector is None else 100 * (self.robust - self.without_detector)


def withstand(
    network: GatedNet, images: ImageSet, defence: Defence, trial: Trial, accuracy: float, seed: int,
    workers: Workers = IN_PROCESS,
) -> list[Withstood]:  # fmt: skip
    """Attack the first images that the network gets right, by each adaptive recipe at each budget.

    Clean images that the detector flags stay in: an attacker may find a version of them that it does not flag. With
    the detector off, plain PGD of as many steps stands beside what the adaptive attacks misled. Below the headline's
    budget, the largest, descents are a quarter as long and start once.

    Args:
        network: the bundle's, in evaluation mode.
        images: the test split.
        defence: what the attacker knows.
        trial: how many images, steps, restarts; which recipes and budgets.
        accuracy: share of clean test images that the network gets right.
        seed: of the attacks.
        workers: who attacks.
    """
    right = images.subset(rightly_classified(network, images.first(2 * trial.images)))
    chosen = right.first(trial.images)
    pixels = to_tensor(chosen.pixels(slice(None)), device_of(network))
    labels = torch.from_numpy(chosen.labels).to(pixels.device)
    tasks = list(_tasks(trial, len(chosen)))
    won = list(workers.map(_Attacking(network, pixels, labels, chosen.ids, defence, seed), tasks))
    found: list[Withstood] = []
    # What an attack did within a budget lies within every larger one.
    misread, evaded = np.zeros(len(chosen), bool), np.zeros(len(chosen), bool)
    lost: dict[str, npt.NDArray[np.bool_]] = {}
    for budget in sorted(trial.budgets):
        tried, off = len(chosen), ""
        for task, one in zip(tasks, won, strict=True):
            if task.budget != budget:
                continue
            misread[: task.images] |= one.fooled
            settings = task.recipe.settings
            if not task.recipe.knows_detector:
                off = f"off: with PGD, steps {settings['steps']}"
                continue
            mine = lost.setdefault(task.recipe.name, np.zeros(task.images, bool))
            mine |= one.reached
            evaded[: task.images] |= one.reached
            tried = min(tried, task.images)
            said = ", ".join(f"{name} {value}" for name, value in settings.items() if name in SAID)
            found.append(_row(task.recipe.name, budget, mine, task.images, said, accuracy, None, defence.exact))
        kept = accuracy * float((~misread).mean())
        found.append(_row(ANY, budget, evaded, tried, off, accuracy, kept, defence.exact))
    return found


@dataclass(frozen=True, slots=True)
class _Task:
    """One attack at one budget, in grey levels of 255, on the first images."""

    budget: int
    recipe: Recipe
    images: int


@dataclass(frozen=True, slots=True)
class _Won:
    """What became of a task's images: misread; misread and unflagged, each `(images,)`."""

    fooled: npt.NDArray[np.bool_]
    reached: npt.NDArray[np.bool_]


def _tasks(trial: Trial, images: int) -> Iterator[_Task]:
    for budget in trial.budgets:
        headline = budget == max(trial.budgets)
        # Below the headline's budget a curve is drawn, by descents a quarter as long.
        steps = trial.steps if headline else max(10, trial.steps // 4)
        restarts = trial.restarts if headline else 1
        plain: dict[str, Setting] = {"steps": steps, "step": 0.25, "stop": True}
        yield _Task(budget, replace(RECIPES["pgd"], budget=budget / 255, settings=plain), images)
        for recipe in ADAPTIVE:
            stepped = recipe.name in STEPPED
            if recipe.name not in trial.recipes or not (stepped or headline):
                continue
            own = {"steps": steps, "restarts": restarts} if stepped else trial.recipes[recipe.name]
            settings = {**recipe.settings, **own}
            few = images if stepped or recipe.images is None else min(images, recipe.images)
            yield _Task(budget, replace(recipe, budget=budget / 255, settings=settings), few)


@dataclass(frozen=True, slots=True)
class _Attacking:
    """What every worker holds; called, it gives what runs one task."""

    network: GatedNet
    pixels: Tensor
    labels: Tensor
    ids: npt.NDArray[np.int64]
    defence: Defence
    seed: int

    def __call__(self) -> Callable[[_Task], _Won]:
        def attack(task: _Task) -> _Won:
            few = slice(task.images)
            known = self.defence if task.recipe.knows_detector else None
            crafted = craft(
                task.recipe, self.network, self.pixels[few], self.labels[few], self.seed, self.ids[few], watcher=known
            )
            return _Won(crafted.fooled, crafted.reached)

        return attack


def _row(
    name: str, budget: int, lost: npt.NDArray[np.bool_], tried: int, settings: str, accuracy: float,
    without: float | None, exact: bool,
) -> Withstood:  # fmt: skip
    kept, images = int((~lost).sum()), len(lost)
    low, high = clopper_pearson(kept, images)
    return Withstood(
        name, budget, images, tried, settings, accuracy * kept / images, accuracy * low, accuracy * high, without, exact
    )


def rows_of_withstood(found: Sequence[Withstood]) -> list[dict[str, object]]:
    """A row for each, for a table."""
    return [
        {
            "attack": row.attack, "budget / 255": row.budget, "images": row.images,
            "images tried by all": row.tried_by_all, "settings": row.settings, "robust accuracy": row.robust,
            "low": row.low, "high": row.high, "detector off": row.without_detector, "points added": row.added,
            "own gradient": row.exact,
        }
        for row in found
    ]  # fmt: skip
