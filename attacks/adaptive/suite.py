"""The adaptive attacks as recipes: the attacker knows network, gates, detector and threshold.

Two budgets make the curve that tells whether an attack has converged: 200 steps and 5 restarts on 200 images, and 1,000
steps and 10 restarts on 50. The two that see scores or decisions only have queries instead.
"""

from dataclasses import replace

from attacks.adaptive.hopskipjump import HopSkipJumpEvasion
from attacks.adaptive.joint import JointLoss
from attacks.adaptive.path import PathMatching
from attacks.adaptive.projected import OrthogonalPGD, SelectivePGD
from attacks.adaptive.square import SquareEvasion
from attacks.recipes import Recipe, Setting

EIGHT = 8 / 255
WIDE: dict[str, Setting] = {"steps": 200, "restarts": 5}
DEEP: dict[str, Setting] = {"steps": 1000, "restarts": 10}

_WITH_GRADIENTS = (
    Recipe("adaptive-joint", "linf", EIGHT, JointLoss, {**WIDE, "weights": 5}),
    Recipe("adaptive-selective", "linf", EIGHT, SelectivePGD, WIDE),
    Recipe("adaptive-orthogonal", "linf", EIGHT, OrthogonalPGD, WIDE),
    Recipe("adaptive-path", "linf", EIGHT, PathMatching, {**WIDE, "weight": 0.1}),
)

ADAPTIVE = tuple(
    replace(recipe, knows_detector=True, costly=True, images=recipe.images or 200)
    for recipe in (
        *_WITH_GRADIENTS,
        Recipe("adaptive-square", "linf", EIGHT, SquareEvasion, {"queries": 5000}),
        Recipe("adaptive-hopskipjump", "linf", EIGHT, HopSkipJumpEvasion, {"steps": 30, "restarts": 2}, images=50),
    )
)
ADAPTIVE_DEEP = tuple(
    replace(
        recipe, name=f"{recipe.name}-deep", settings={**recipe.settings, **DEEP}, knows_detector=True, costly=True,
        images=50,
    )
    for recipe in _WITH_GRADIENTS
)  # fmt: skip
