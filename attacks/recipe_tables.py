"""The tables of recipes and suites that stand in `docs/attacks.md`, made from the code that runs them.

    python -m attacks.recipe_tables docs/attacks.md

rewrites what stands between the markers of that file; a test fails where the file and the code differ.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from attacks.recipes import Recipe
from attacks.suites import SUITES, suite_rows


def table_of_suites() -> str:
    """Which recipe is in which suite, on how many images of each split, with its norm and budget."""
    rows = suite_rows([suite for name, suite in SUITES.items() if name != "corruptions"])
    names = [name for name in SUITES if name != "corruptions"]
    by_recipe: dict[str, dict[str, str]] = {}
    for row in rows:
        cells = by_recipe.setdefault(str(row["recipe"]), {"norm": str(row["norm"]), "budget": str(row["budget"])})
        cells[str(row["suite"])] = str(row["images"])
    lines = [
        [f"`{recipe}`", _norm(cells["norm"]), cells["budget"], *(cells.get(name, "") for name in names)]
        for recipe, cells in by_recipe.items()
    ]
    return _markdown(["recipe", "norm", "budget", *(f"`{name}`" for name in names)], lines)


def table_of_settings() -> str:
    """Every attack once, whatever its epsilon: its settings, and what sets it apart."""
    seen: dict[str, Recipe] = {}
    for suite in SUITES.values():
        for recipe in suite.recipes():
            if recipe.is_attack:
                seen.setdefault(recipe.name, recipe)
    lines = [
        [f"`{recipe.name}`", _norm(recipe.norm or "-"), _settings(recipe), _remarks(recipe)]
        for recipe in seen.values()
        if not _is_another_epsilon(recipe, seen)
    ]
    return _markdown(["recipe", "norm", "settings", "remarks"], lines)


def table_of_purposes() -> str:
    """What each suite is for."""
    lines = [[f"`{suite.name}`", suite.purpose, str(len(suite.members))] for suite in SUITES.values()]
    return _markdown(["suite", "purpose", "recipes"], lines)


TABLES: Mapping[str, Callable[[], str]] = {
    "purposes": table_of_purposes,
    "suites": table_of_suites,
    "settings": table_of_settings,
}


def with_tables(text: str) -> str:
    """`text` with every table between `<!-- NAME: made by attacks.recipe_tables -->` and `<!-- end -->` made anew."""
    for name, table in TABLES.items():
        begin = f"<!-- {name}: made by attacks.recipe_tables -->\n"
        before, found, rest = text.partition(begin)
        old, ended, after = rest.partition("<!-- end -->")
        if not found or not ended:
            raise ValueError(f"expected {begin.strip()} and <!-- end --> in the text, got none")
        del old
        text = f"{before}{begin}{table()}{ended}{after}"
    return text


def _is_another_epsilon(recipe: Recipe, others: Mapping[str, Recipe]) -> bool:
    base = others.get(re.sub(r"-\d+$", "", recipe.name))
    return base is not None and base.name != recipe.name and base.settings == recipe.settings


def _settings(recipe: Recipe) -> str:
    return ", ".join(f"{name} {value}" for name, value in recipe.settings.items())


def _remarks(recipe: Recipe) -> str:
    said = [
        f"target: {recipe.target}" if recipe.target else "",
        "gates frozen" if recipe.gates == "frozen" else "",
        "made on the plain backbone" if recipe.source == "backbone" else "",
        "knows the detector" if recipe.knows_detector else "",
        "costly" if recipe.costly else "",
    ]
    return "; ".join(text for text in said if text)


def _norm(norm: str) -> str:
    return {"linf": "L-inf", "l2": "L2", "l1": "L1", "l0": "L0"}.get(norm, norm)


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
