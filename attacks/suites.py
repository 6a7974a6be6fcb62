"""Suites of recipes, and everything that `--recipes` understands.

One table, `SUITES`, says which recipe runs on how many images; `suite_rows` turns it into rows for a person. Attacks by
means of the detector and noise are found by name like all others, but looked up only when asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from attacks.recipe_file import recipes_in
from attacks.recipes import RECIPES, Recipe
from detector.errors import RequestError

COSTLY_IMAGES = 200
NOISE = "noise-"


@dataclass(frozen=True, slots=True)
class Suite:
    """Recipes that are run together.

    Attributes:
        name: what `--recipes` calls it.
        purpose: one line for a person.
        members: names of the recipes -> at most this many images of each split, None for all that are given. Costly
            recipes, and others whose own line says so, keep to their own number where this one is larger.
    """

    name: str
    purpose: str
    members: Mapping[str, int | None]

    def recipes(self) -> list[Recipe]:
        """The members, each with its number of images."""
        return [_on_at_most(recipe_named(name), images) for name, images in self.members.items()]


QUICK = ("fgsm", "pgd", "pgd-2", "pgd-l2")
STANDARD = (
    "fgsm-1", "fgsm-2", "fgsm-4", "fgsm", "bim-2", "bim", "bim-end", "pgd-1", "pgd-2", "pgd-4", "pgd", "pgd-end-2",
    "pgd-end", "mi-fgsm", "apgd-ce-2", "apgd-ce", "apgd-dlr", "pgd-l2", "pgd-l2-end", "apgd-l2", "pgd-targeted",
    "pgd-frozen", "fgsm-transfer", "pgd-transfer", "noise-pgd", "noise-pgd-2",
)  # fmt: skip
STANDARD_ON_FEWER = {"deepfool": 1000, "cw": 1000, "noise-cw": 1000, "square": 1000, "sparsefool": 500, "ddn": 500,
                     "ead": 500}  # fmt: skip


def _everything() -> Iterator[str]:
    for recipe in RECIPES.values():
        yield recipe.name
    for name in ("pgd", "pgd-2", "pgd-l2", "cw", "deepfool", "square"):
        yield f"{NOISE}{name}"


SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("quick", "a look, in a minute", dict.fromkeys(QUICK)),
        Suite("standard", "what fits and judges a detector", {**dict.fromkeys(STANDARD), **STANDARD_ON_FEWER}),
        Suite("full", "every recipe", dict.fromkeys(_everything())),
        Suite("adaptive", "attacks that know the detector", dict.fromkeys((
            "adaptive-joint", "adaptive-selective", "adaptive-orthogonal", "adaptive-path", "adaptive-square",
            "adaptive-hopskipjump",
        ))),
        Suite("adaptive-deep", "the same with five times the steps, on fewer images", dict.fromkeys((
            "adaptive-joint-deep", "adaptive-selective-deep", "adaptive-orthogonal-deep", "adaptive-path-deep",
        ))),
        Suite("corruptions", "the fifteen of CIFAR-10-C at five severities; negatives", dict.fromkeys(
            f"{name}-{severity}" for name in (
                "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
                "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
                "jpeg_compression",
            ) for severity in range(1, 6)
        )),
    )
}  # fmt: skip


def recipe_named(name: str) -> Recipe:
    """The recipe of that name: an attack, one that knows the detector, a corruption, or `noise-ATTACK`.

    Raises:
        RequestError: there is none; the message names the nearest.
    """
    if name in RECIPES:
        return RECIPES[name]
    # These are made from the recipes here, and some take a second to import.
    from attacks.adaptive.suite import ADAPTIVE, ADAPTIVE_DEEP
    from attacks.negatives import CORRUPTED, noise_like

    others = {recipe.name: recipe for recipe in (*ADAPTIVE, *ADAPTIVE_DEEP, *CORRUPTED)}
    if name in others:
        return others[name]
    matched = name.removeprefix(NOISE)
    if matched != name and (matched in RECIPES or matched in others):
        return noise_like(recipe_named(matched))
    near = get_close_matches(name, [*SUITES, *RECIPES, *others], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise RequestError(
        f"expected a suite ({', '.join(SUITES)}), recipes such as pgd,cw or a .toml file; got {name!r}{hint}"
    )


def recipes_named(text: str) -> list[Recipe]:
    """What `--recipes` means: suites and recipes by commas, or a TOML file; each recipe once, in the order given.

    Raises:
        RequestError: a name is unknown, none is given, or the file is wrong.
    """
    if text.endswith(".toml"):
        return recipes_in(Path(text))
    found: dict[str, Recipe] = {}
    for name in (part.strip() for part in text.split(",")):
        if name:
            members = SUITES[name].recipes() if name in SUITES else [_on_at_most(recipe_named(name), None)]
            for recipe in members:
                found.setdefault(recipe.name, recipe)
    if not found:
        raise RequestError(f"expected a suite ({', '.join(SUITES)}), recipes such as pgd,cw or a .toml file; got none")
    return list(found.values())


def suite_rows(suites: Sequence[Suite]) -> list[dict[str, object]]:
    """One row for each member of each suite, for a table."""
    return [
        {
            "suite": suite.name, "recipe": recipe.name, "norm": recipe.norm or "-", "budget": _budget(recipe),
            "images": "all" if recipe.images is None else str(recipe.images),
            "settings": ", ".join(f"{k} {v}" for k, v in recipe.settings.items()),
        }
        for suite in suites
        for recipe in suite.recipes()
    ]  # fmt: skip


def _on_at_most(recipe: Recipe, images: int | None) -> Recipe:
    limits = [limit for limit in (images, recipe.images, COSTLY_IMAGES if recipe.costly else None) if limit is not None]
    return replace(recipe, images=min(limits, default=None))


def _budget(recipe: Recipe) -> str:
    if recipe.budget is None:
        return "smallest" if recipe.is_attack else "-"
    levels = recipe.budget * 255
    whole = recipe.norm == "linf" and abs(levels - round(levels)) < 1e-9
    return f"{round(levels)}/255" if whole else f"{recipe.budget:g}"
