"""The adaptive attacks as recipes: the attacker knows network, gates, detector and threshold.

Two budgets make the curve that tells whether an attack has converged: 200 steps and 5 restarts on 200 images, and 1,000
steps and 10 restarts on 50. The two that see scores or decisions only have queries instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from attacks.adaptive.hopskipjump import HopSkipJumpEvasion
from attacks.adaptive.joint import JointLoss
from attacks.adaptive.path import PathMatching
from attacks.adaptive.projected import OrthogonalPGD, SelectivePGD
from attacks.adaptive.square import SquareEvasion
from attacks.recipes import Attack, Recipe, Setting

EIGHT = 8 / 255
WIDE: dict[str, Setting] = {"steps": 200, "restarts": 5}
DEEP: dict[str, Setting] = {"steps": 1000, "restarts": 10}

STEPS: dict[str, Setting] = {"step": 0.25, "momentum": 0.75}
SWEEP: dict[str, Setting] = {**STEPS, "lightest": 0.1, "heaviest": 10.0, "loss": "margin", "beyond": 0.5}
PROJECTED: dict[str, Setting] = {**STEPS, "lead": 0.05}


def _recipe(
    name: str, make: Callable[..., Attack], settings: Mapping[str, Setting], unwritten: Mapping[str, Setting],
    images: int = 200,
) -> Recipe:  # fmt: skip
    """An attack with all settings, of which the first versions stored only some."""
    return Recipe(
        name, "linf", EIGHT, make, {**settings, **unwritten}, knows_detector=True, costly=True, images=images,
        unwritten=unwritten,
    )  # fmt: skip


_WITH_GRADIENTS = (
    _recipe("adaptive-joint", JointLoss, {**WIDE, "weights": 5}, SWEEP),
    _recipe("adaptive-selective", SelectivePGD, WIDE, PROJECTED),
    _recipe("adaptive-orthogonal", OrthogonalPGD, WIDE, PROJECTED),
    _recipe("adaptive-path", PathMatching, {**WIDE, "weight": 0.1}, STEPS),
)

ADAPTIVE = (
    *_WITH_GRADIENTS,
    _recipe("adaptive-square", SquareEvasion, {"queries": 5000}, {"weight": 1.0, "share": 0.8, "lead": 0.05}),
    _recipe("adaptive-hopskipjump", HopSkipJumpEvasion, {"steps": 30, "restarts": 2}, {"queries": 100}, images=50),
)
ADAPTIVE_DEEP = tuple(
    replace(recipe, name=f"{recipe.name}-deep", settings={**recipe.settings, **DEEP}, images=50)
    for recipe in _WITH_GRADIENTS
)
