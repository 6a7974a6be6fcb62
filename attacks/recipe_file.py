"""Recipes that a user describes in a TOML file, each starting from one of ours.

[gentle-pgd]            # its name, in the report and in the store
kind = "pgd"            # the recipe that it starts from
budget = "3/255"        # or 0.0118
steps = 40              # any of that recipe's settings
gates = "frozen"        # straight-through or frozen
source = "backbone"     # decoupled or backbone
target = "random"       # random, runner-up, least-likely
images = 500            # at most this many of each split

Attacks that know the detector work on what is served: they have neither gates nor source to choose.
"""

import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from math import isfinite
from pathlib import Path
from typing import Any

from attacks.negatives import CORRUPTED
from attacks.recipes import RECIPES, Recipe, Setting
from detector.errors import RequestError

COMMON = ("kind", "budget", "target", "images")
OF_THE_NETWORK = ("gates", "source")


def recipes_in(file: Path) -> list[Recipe]:
    """The recipes of a TOML file, in its order.

    Raises:
        RequestError: the file cannot be read, is no TOML, or describes no recipe that there could be; one line that
            names the recipe and the key.
    """
    try:
        content = tomllib.loads(file.read_text())
    except OSError as error:
        raise RequestError(f"expected a file of recipes in {file}, got: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"expected TOML in {file}, got: {' '.join(str(error).split())}") from None
    if not content:
        raise RequestError(f"expected a [NAME] for each recipe in {file}, got none")
    ours = _ours()
    return [_recipe(name, described, file, ours) for name, described in content.items()]


def _ours() -> Mapping[str, Recipe]:
    """What a recipe may start from."""
    from attacks.adaptive.suite import ADAPTIVE, ADAPTIVE_DEEP  # takes a second, and few commands need it

    return {**RECIPES, **{recipe.name: recipe for recipe in (*ADAPTIVE, *ADAPTIVE_DEEP)}}


def budget_from(value: object, where: str) -> float:
    """A budget as a person writes it, 0.03 or "8/255".

    Raises:
        RequestError: it is neither.
    """
    try:
        if isinstance(value, str):
            return float(Fraction(value.replace(" ", "")))
        if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            return float(value)
    except (ValueError, ArithmeticError):  # 1/0, and numbers of hundreds of digits
        pass
    raise RequestError(f'expected a budget such as 0.03 or "8/255" in {where}, got {value!r}')


def _recipe(name: str, described: Any, file: Path, ours: Mapping[str, Recipe]) -> Recipe:
    where = f"[{name}] of {file}"
    if not isinstance(described, dict):
        raise RequestError(f"expected a [NAME] for each recipe in {file}, got the key {name!r} outside of any")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RequestError(f"expected a name of letters, digits, '.', '-' and '_' in {file}, got {name!r}")
    if name in ours or name.startswith("noise-") or name in {recipe.name for recipe in CORRUPTED}:
        raise RequestError(f"expected a name of its own in {where}, got that of a recipe of ours; call it my-{name}")
    kind = described.get("kind")
    if not isinstance(kind, str) or kind not in ours:
        raise RequestError(f"expected a kind in {where}, one of {', '.join(ours)}; got {kind!r}")
    base = ours[kind]
    known = (*COMMON, *(() if base.knows_detector else OF_THE_NETWORK), *base.settings)
    unknown = [key for key in described if key not in known]
    if unknown:
        raise RequestError(f"expected keys of {', '.join(known)} in {where}, got {', '.join(unknown)}")
    changes: dict[str, Any] = {key: described[key] for key in ("gates", "source", "target") if key in described}
    if "budget" in described:
        if base.budget is None:
            raise RequestError(f"expected no budget in {where}: {kind} seeks the smallest change; got one")
        changes["budget"] = budget_from(described["budget"], where)
    if "images" in described:
        images = described["images"]
        if not isinstance(images, int) or isinstance(images, bool) or images < 1:
            raise RequestError(f"expected a number of images from 1 in {where}, got {images!r}")
        changes["images"] = images
    settings = {key: _setting(key, described[key], usual, where) for key, usual in base.settings.items()
                if key in described}  # fmt: skip
    if changes.get("source") == "backbone" and "stop" in base.settings and "stop" not in settings:
        settings["stop"] = False  # where it fools the backbone is not where it fools the network
    recipe = replace(base, name=name, settings={**base.settings, **settings}, **changes)
    recipe.attack()  # refuses what its settings cannot be
    return recipe


def _setting(key: str, value: object, usual: Setting, where: str) -> Setting:
    """A setting of the same kind as usual: a flag, a whole number from 1, a number from 0 or a text."""
    if isinstance(usual, bool) or isinstance(value, bool):
        fits = isinstance(usual, bool) and isinstance(value, bool)
        wanted = "true or false"
    elif isinstance(usual, int):
        fits, wanted = isinstance(value, int) and value >= 1, "a whole number from 1"
    elif isinstance(usual, float):
        fits = isinstance(value, int | float) and 0 <= value <= sys.float_info.max
        wanted = "a number from 0"
    else:
        fits, wanted = isinstance(value, str), "a text"
    if not fits:
        raise RequestError(f"expected {wanted} for {key} in {where}, got {value!r}")
    assert isinstance(value, bool | int | float | str)
    return float(value) if isinstance(usual, float) and not isinstance(usual, bool) else value
