"""Every attack, one line each: what it is called, what it may change, and how it is made.

A new attack is a line in `RECIPES`; the tests run over the same table. torchattacks is imported in this package only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torchattacks
from torch import Tensor, nn

from attacks.minimum_norm import CarliniWagner, DeepFool
from detector.errors import RequestError

Norm = Literal["linf", "l2"]
Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One attack with its parameters.

    Attributes:
        name: what commands and tables call it.
        norm: in which norm the change is bounded or made small.
        budget: largest change in that norm, pixels in [0, 1]; None for attacks that seek the smallest change.
        make: network, budget (0 where there is none) and settings -> attack: images in [0, 1] and right labels ->
            images.
        settings: numbers beyond the budget, such as steps; stored with what was crafted.
    """

    name: str
    norm: Norm
    budget: float | None
    make: Callable[..., Attack]
    settings: Mapping[str, int] = field(default_factory=dict)

    def against(self, network: nn.Module) -> Attack:
        """The attack on `network`, which takes images in [0, 1], `(batch, channels, height, width)`, to logits."""
        return self.make(network, self.budget or 0.0, **self.settings)

    @property
    def parameters(self) -> dict[str, object]:
        """All that tells this attack from another, JSON values."""
        return {"norm": self.norm, "budget": self.budget, **self.settings}


def _pgd(network: nn.Module, eps: float, steps: int) -> Attack:
    attack: Attack = torchattacks.PGD(network, eps=eps, alpha=eps / 4, steps=steps)
    return attack


def _square(network: nn.Module, eps: float, queries: int) -> Attack:
    # torchattacks seeds Square by itself, always alike: hand it a draw of the crafting seed instead.
    seed = int(torch.randint(2**31 - 1, ()))
    attack: Attack = torchattacks.Square(network, eps=eps, n_queries=queries, seed=seed)
    return attack


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fgsm", "linf", 8 / 255, lambda net, eps: torchattacks.FGSM(net, eps=eps)),
        Recipe("pgd", "linf", 8 / 255, _pgd, {"steps": 10}),
        Recipe("pgd-2", "linf", 2 / 255, _pgd, {"steps": 10}),
        Recipe(
            "pgd-l2", "l2", 0.5,
            lambda net, eps, steps: torchattacks.PGDL2(net, eps=eps, alpha=eps / 4, steps=steps), {"steps": 10},
        ),
        Recipe(
            "cw", "l2", None, lambda net, _, steps, searches: CarliniWagner(net, steps, searches),
            {"steps": 100, "searches": 6},
        ),
        Recipe("deepfool", "l2", None, lambda net, _, steps: DeepFool(net, steps), {"steps": 30}),
        Recipe("square", "linf", 8 / 255, _square, {"queries": 500}),
    )
}  # fmt: skip


def recipes_named(names: str) -> list[Recipe]:
    """The recipes of a comma-separated list of names.

    Raises:
        RequestError: a name is unknown, or none is given.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in RECIPES]
    if unknown or not wanted:
        got = ", ".join(unknown) if unknown else "none"
        raise RequestError(f"expected attacks of {', '.join(RECIPES)}; got {got}")
    return [RECIPES[name] for name in dict.fromkeys(wanted)]
