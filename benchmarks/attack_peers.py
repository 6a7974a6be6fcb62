"""The attacks that foolbox and adv-lib have too, each at the settings of our recipe of that name.

Where a library lets a user choose, it gets what makes it strongest at the same number of steps: no early abort in C&W
and EAD, and the first constant and step size that did best on 25 images, of six tried for C&W and of two for EAD (their
defaults, 0.001 and 0.01, spend most of a few searches on finding a constant that fools at all). Its answer is taken as
it comes, but for one repair: foolbox's C&W and EAD hand back black images for those that they could not fool, which a
network would get "wrong".
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from attacks.recipes import Recipe
from detector.errors import DataError
from detector.torchvision_ops import import_torchvision

FOOLBOX, ADV_LIB = "foolbox", "adv-lib"
PACKAGES = {FOOLBOX: "foolbox", ADV_LIB: "adv-lib"}
INF = float("inf")
CW_CONSTANT, CW_STEP, EAD_CONSTANT, EAD_STEP = 0.05, 0.003, 0.5, 0.01

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Peer:
    """One attack of another library.

    Attributes:
        library: `foolbox` or `adv-lib`.
        name: what that library calls it, with the settings given.
        attack: network, images in [0, 1] and right labels -> attacked images.
    """

    library: str
    name: str
    attack: Attack


def peers_of(recipe: Recipe) -> list[Peer]:
    """The attacks of other libraries that are held against `recipe`; none where they have none."""
    base = recipe.name.rstrip("0123456789").removesuffix("-") if recipe.norm == "linf" else recipe.name
    return [_peer(recipe, *call) for call in CALLS.get(base, ())]


def library_version(library: str) -> str:
    """Its version.

    Raises:
        DataError: it is not installed.
    """
    try:
        return version(PACKAGES[library])
    except PackageNotFoundError:
        raise DataError(
            "expected foolbox 3.3.4 and adv-lib 0.2.8, got none; `make install`, then "
            "`pip install --no-deps adv-lib==0.2.8`"
        ) from None


def _common(recipe: Recipe) -> dict[str, Any]:
    """What calls below take from a recipe: its budget, its settings, and a step in pixels where it has steps."""
    values: dict[str, Any] = {"eps": recipe.budget, **recipe.settings}
    if recipe.budget is not None and "step" in recipe.settings:
        values["stepsize"] = float(recipe.settings["step"]) * recipe.budget
    return values


def _peer(recipe: Recipe, library: str, function: str, arguments: Callable[[dict[str, Any]], dict[str, Any]]) -> Peer:
    settings = arguments(_common(recipe))
    shown = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                      for name, value in settings.items())  # fmt: skip
    run = _of_foolbox if library == FOOLBOX else _of_adv_lib
    return Peer(library, f"{function}({shown})", run(function, settings, recipe.budget))


def _of_foolbox(name: str, settings: Mapping[str, Any], budget: float | None) -> Attack:
    def attack(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it asks SciPy for a name that SciPy is giving up
            foolbox = import_module("foolbox")
        model = foolbox.PyTorchModel(network, bounds=(0, 1), device=images.device)
        made, _, _ = getattr(foolbox.attacks, name)(**settings)(model, images, labels, epsilons=budget)
        blank = (made.flatten(1).abs().amax(dim=1) == 0)[:, None, None, None]
        result: Tensor = torch.where(blank, images, made)
        return result

    return attack


def _of_adv_lib(name: str, settings: Mapping[str, Any], _budget: float | None) -> Attack:
    def attack(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        import_torchvision()
        # Its loggers import visdom, whose release does not build on today's setuptools; nothing here draws with it.
        sys.modules.setdefault("visdom", ModuleType("visdom"))
        result: Tensor = getattr(import_module("adv_lib.attacks"), name)(network, images, labels, **settings)
        return result

    return attack


def _cw(ours: dict[str, Any]) -> dict[str, Any]:
    return {
        "binary_search_steps": ours["searches"],
        "steps": ours["steps"],
        "stepsize": CW_STEP,
        "initial_const": CW_CONSTANT,
        "abort_early": False,
    }


def _cw_adv_lib(ours: dict[str, Any]) -> dict[str, Any]:
    return {
        "binary_search_steps": ours["searches"],
        "max_iterations": ours["steps"],
        "learning_rate": CW_STEP,
        "initial_const": CW_CONSTANT,
        "abort_early": False,
    }


def _ead(ours: dict[str, Any]) -> dict[str, Any]:
    return {
        "binary_search_steps": ours["searches"],
        "steps": ours["steps"],
        "initial_stepsize": EAD_STEP,
        "initial_const": EAD_CONSTANT,
        "regularization": 0.01,
        "decision_rule": "L1",
        "abort_early": False,
    }


Call = tuple[str, str, Callable[[dict[str, Any]], dict[str, Any]]]

# Our recipe (without its epsilon) -> calls of other libraries.
CALLS: Mapping[str, Sequence[Call]] = {
    "fgsm": ((FOOLBOX, "LinfFastGradientAttack", lambda _: {"random_start": False}),),
    "bim": (
        (FOOLBOX, "LinfBasicIterativeAttack", lambda o: {
            "steps": o["steps"], "abs_stepsize": o["stepsize"], "random_start": False,
        }),
    ),
    "pgd": (
        (FOOLBOX, "LinfPGD", lambda o: {"steps": o["steps"], "abs_stepsize": o["stepsize"]}),
        (ADV_LIB, "pgd_linf", lambda o: {"ε": o["eps"], "steps": o["steps"], "absolute_step_size": o["stepsize"]}),
    ),
    "mi-fgsm": (
        (FOOLBOX, "LinfMomentumIterativeFastGradientMethod", lambda o: {
            "steps": o["steps"], "abs_stepsize": o["stepsize"], "momentum": o["momentum"],
        }),
    ),
    "pgd-l2": ((FOOLBOX, "L2PGD", lambda o: {"steps": o["steps"], "abs_stepsize": o["stepsize"]}),),
    "apgd-ce": (
        (ADV_LIB, "apgd", lambda o: {"eps": o["eps"], "norm": INF, "n_iter": o["steps"], "loss_function": "ce"}),
    ),
    "apgd-dlr": (
        (ADV_LIB, "apgd", lambda o: {"eps": o["eps"], "norm": INF, "n_iter": o["steps"], "loss_function": "dlr"}),
    ),
    "apgd-l2": (
        (ADV_LIB, "apgd", lambda o: {"eps": o["eps"], "norm": 2, "n_iter": o["steps"], "loss_function": "ce"}),
    ),
    "deepfool": (
        (FOOLBOX, "L2DeepFoolAttack", lambda o: {"steps": o["steps"], "candidates": 10, "overshoot": 0.02}),
        (ADV_LIB, "df", lambda o: {"steps": o["steps"], "overshoot": 0.02}),
    ),
    "cw": ((FOOLBOX, "L2CarliniWagnerAttack", _cw), (ADV_LIB, "carlini_wagner_l2", _cw_adv_lib)),
    "ddn": (
        (FOOLBOX, "DDNAttack", lambda o: {"steps": o["steps"]}),
        (ADV_LIB, "ddn", lambda o: {"steps": o["steps"]}),
        (ADV_LIB, "fmn", lambda o: {"norm": 2, "steps": o["steps"]}),
    ),
    "ead": ((FOOLBOX, "EADAttack", _ead),),
    "fmn-l1": ((ADV_LIB, "fmn", lambda o: {"norm": 1, "steps": o["steps"]}),),
    "hopskipjump": ((FOOLBOX, "HopSkipJumpAttack", lambda o: {"steps": o["steps"]}),),
}  # fmt: skip
