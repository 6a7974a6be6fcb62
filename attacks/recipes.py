"""Every attack, one line each: what it is called, what it may change, and how it is made.

A new attack is a line in `RECIPES`; the tests run over the same table, and a user's TOML file starts from its lines.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import Tensor

from attacks.methods.auto import AutoAttack, AutoPGD
from attacks.methods.fast_minimum_norm import FastMinimumNorm
from attacks.methods.gradient import Ascent
from attacks.methods.library import DDN, HopSkipJump, onepixel
from attacks.methods.minimum_norm import CarliniWagner, DeepFool
from attacks.methods.sparse import ElasticNet, SaliencyMap, SparseFool
from attacks.methods.square import Square
from attacks.problem import Problem
from detector.errors import RequestError

Norm = Literal["linf", "l2", "l1", "l0"]
TargetRule = Literal["random", "runner-up", "least-likely"]
Gates = Literal["straight-through", "frozen"]
Source = Literal["decoupled", "backbone"]
Setting = int | float | str | bool
Attack = Callable[[Problem], Tensor]
EPSILONS = (1, 2, 4, 8)  # / 255

# Every setting stands here, also where it is the usual one: what is stored with the images tells all.
PGD: Mapping[str, Setting] = {"steps": 10, "step": 0.25, "stop": True}
TO_THE_END: Mapping[str, Setting] = {**PGD, "stop": False}
MI_FGSM: Mapping[str, Setting] = {**PGD, "momentum": 1.0}
APGD: Mapping[str, Setting] = {"steps": 100, "restarts": 1, "rho": 0.75}
OFFICIAL: Mapping[str, Setting] = {"steps": 100, "targets": 9, "queries": 5000}
CW: Mapping[str, Setting] = {"steps": 60, "searches": 2, "tries": 5, "start": 3.0, "rate": 0.2, "patience": 0.3}
EAD: Mapping[str, Setting] = {"steps": 50, "searches": 5, "start": 10.0, "learning_rate": 0.01, "beta": 0.01}

FMN: Mapping[str, Setting] = {
    "steps": 100, "length": 1.0, "last_length": 0.01, "growth": 0.05, "last_growth": 0.001,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """One attack with its parameters.

    Attributes:
        name: what commands and tables call it.
        norm: in which norm the change is bounded or made small; None for noise and corruptions, which aim at nothing.
        budget: largest change in that norm, pixels in [0, 1] (for `l0`: changed values); None for attacks that seek
            the smallest change.
        make: budget (left out where there is none) and settings -> attack: problem -> images in [0, 1].
        settings: what `make` takes beyond the budget, such as steps, JSON values; stored with what was crafted.
        target: how the label to reach is chosen, from the network's logits; None where any wrong label will do.
        gates: whether gradients pass the gates of a decoupled network straight through, or see none of them.
        source: the network that the attack works on; what it makes is always judged on the decoupled one.
        knows_detector: whether it works against the detector too: its goal is then a wrong label that is not flagged.
        matches: name of the recipe whose changes' L2 lengths it takes over, for noise; None for all others.
        costly: whether it takes seconds for one image, so that suites run it on few.
        images: attack at most this many images of each split; None for all. No parameter of the attack: a later run
            may ask for more.
        kind: name of the recipe that it is a variant of; its own where that is left out.
        unwritten: settings that earlier versions did not store, with the values that they had.
    """

    name: str
    norm: Norm | None
    budget: float | None
    make: Callable[..., Attack]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    target: TargetRule | None = None
    gates: Gates = "straight-through"
    source: Source = "decoupled"
    knows_detector: bool = False
    matches: str | None = None
    costly: bool = False
    images: int | None = None
    kind: str = ""
    unwritten: Mapping[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or self.name)
        for value, choices in ((self.target, (None, *get_args(TargetRule))), (self.gates, get_args(Gates)),
                               (self.source, get_args(Source)), (self.norm, (None, *get_args(Norm)))):  # fmt: skip
            if value not in choices:
                known = ", ".join(str(choice) for choice in choices if choice)
                raise RequestError(f"expected {known} in the attack {self.name}, got {value!r}")
        if self.gates == "frozen" and self.source == "backbone":
            raise RequestError(
                f"expected gates to freeze in the attack {self.name}, got the backbone as its source, which has none"
            )
        if self.target is not None and getattr(self.make, "untargeted", False):
            raise RequestError(f"expected no target for the attack {self.name}, which takes any wrong label; got one")
        if self.budget is not None and not 0 < self.budget <= (1 if self.norm == "linf" else float("inf")):
            upper = " to 1 (for example 8/255)" if self.norm == "linf" else ""
            raise RequestError(f"expected a budget above 0{upper} for the attack {self.name}, got {self.budget:g}")

    def attack(self) -> Attack:
        """The attack itself."""
        return self.make(**self.settings) if self.budget is None else self.make(self.budget, **self.settings)

    @property
    def is_attack(self) -> bool:
        """Whether it aims at fooling; noise and corruptions do not, and count as negatives."""
        return self.norm is not None

    @property
    def parameters(self) -> dict[str, object]:
        """All that tells this attack from another, JSON values."""
        return {
            "kind": self.kind, "norm": self.norm, "budget": self.budget, "target": self.target, "gates": self.gates,
            "source": self.source, **self.settings,
            # Noise of earlier versions drew the numbers of the attack whose length it took, and says nothing of them.
            **({"matches": self.matches, "draws": "of its own"} if self.matches else {}),
        }  # fmt: skip


def on_grid(recipe: Recipe) -> Iterator[Recipe]:
    """`NAME-1`, `NAME-2`, `NAME-4` at these epsilons / 255, and `NAME` itself at 8 / 255."""
    for epsilon in EPSILONS:
        name = recipe.name if epsilon == 8 else f"{recipe.name}-{epsilon}"
        yield replace(recipe, name=name, budget=epsilon / 255)


EIGHT, HALF = 8 / 255, 0.5
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *on_grid(Recipe("fgsm", "linf", EIGHT, lambda eps: Ascent("linf", eps, steps=1, step=1.0))),
        *on_grid(Recipe("bim", "linf", EIGHT, lambda eps, **s: Ascent("linf", eps, **s), PGD)),
        *on_grid(Recipe("pgd", "linf", EIGHT, lambda eps, **s: Ascent("linf", eps, start=True, **s), PGD)),
        *on_grid(Recipe("mi-fgsm", "linf", EIGHT, lambda eps, **s: Ascent("linf", eps, **s), MI_FGSM)),
        *on_grid(Recipe("apgd-ce", "linf", EIGHT, lambda eps, **s: AutoPGD("linf", eps, "ce", **s), APGD)),
        *on_grid(Recipe("apgd-dlr", "linf", EIGHT, lambda eps, **s: AutoPGD("linf", eps, "dlr", **s), APGD)),
        *on_grid(Recipe("autoattack", "linf", EIGHT, AutoAttack, OFFICIAL, costly=True)),
        *on_grid(Recipe("square", "linf", EIGHT, Square, {"queries": 1000, "share": 0.8})),
        Recipe("pgd-l2", "l2", HALF, lambda eps, **s: Ascent("l2", eps, start=True, **s), PGD),
        Recipe("apgd-l2", "l2", HALF, lambda eps, **s: AutoPGD("l2", eps, "ce", **s), APGD),
        Recipe("deepfool", "l2", None, DeepFool, {"steps": 50, "step_overshoot": 0.02, "candidates": 3}),
        Recipe("cw", "l2", None, CarliniWagner, CW),
        Recipe("ddn", "l2", None, DDN, {"steps": 100}),
        Recipe("hopskipjump", "l2", None, HopSkipJump, {"steps": 20, "trials": 100}, costly=True),
        Recipe("ead", "l1", None, ElasticNet, EAD),
        Recipe("fmn-l1", "l1", None, FastMinimumNorm, FMN),
        Recipe("jsma", "l0", None, SaliencyMap, {"share": 0.1, "up": True}, target="runner-up", costly=True),
        Recipe("sparsefool", "l0", None, SparseFool, {"steps": 10, "reach": 3.0}),
        Recipe("onepixel", "l0", None, onepixel, {"pixels": 1, "steps": 30, "population": 100}, costly=True),
        Recipe("pgd-targeted", "linf", EIGHT, lambda eps, **s: Ascent("linf", eps, start=True, **s), PGD, "random"),
        Recipe("cw-targeted", "l2", None, CarliniWagner, CW, "random"),
        Recipe("pgd-frozen", "linf", EIGHT, lambda eps, **s: Ascent("linf", eps, start=True, **s), PGD, gates="frozen"),
        Recipe("cw-frozen", "l2", None, CarliniWagner, CW, gates="frozen"),
        # Without a stop: an image that the backbone alone gets wrong is attacked too.
        Recipe("fgsm-transfer", "linf", EIGHT, lambda eps, **s: Ascent("linf", eps, steps=1, step=1.0, **s),
               {"stop": False}, source="backbone"),
        Recipe("pgd-transfer", "linf", EIGHT, lambda eps, **s: Ascent("linf", eps, start=True, **s), TO_THE_END,
               source="backbone"),
        Recipe("mi-fgsm-transfer", "linf", EIGHT, lambda eps, **s: Ascent("linf", eps, **s),
               {**MI_FGSM, "stop": False}, source="backbone"),
        # All steps, as most papers run them: far beyond the boundary, where the same success lies further from it.
        Recipe("bim-end", "linf", EIGHT, lambda eps, **s: Ascent("linf", eps, **s), TO_THE_END),
        *on_grid(Recipe("pgd-end", "linf", EIGHT, lambda eps, **s: Ascent("linf", eps, start=True, **s), TO_THE_END)),
        Recipe("pgd-l2-end", "l2", HALF, lambda eps, **s: Ascent("l2", eps, start=True, **s), TO_THE_END),
    )
}  # fmt: skip
