"""Named suites of attacks: which recipes, on how many images of each split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from attacks.recipes import RECIPES, Recipe

COSTLY_IMAGES = 200


@dataclass(frozen=True, slots=True)
class Suite:
    """Recipes that are run together.

    Attributes:
        name: what `--recipes` calls it.
        purpose: one line for a person.
        members: names of the recipes -> images of each split to attack, None for all that are given.
    """

    name: str
    purpose: str
    members: Mapping[str, int | None]

    def recipes(self) -> list[Recipe]:
        """The members, each with its number of images."""
        return [replace(RECIPES[name], images=images) for name, images in self.members.items()]


def suite_rows(suites: Sequence[Suite]) -> list[dict[str, object]]:
    """One row for each member of each suite, for a table."""
    return [
        {
            "suite": suite.name, "recipe": recipe.name, "norm": recipe.norm or "", "budget": recipe.budget,
            "images": recipe.images, "settings": ", ".join(f"{k} {v}" for k, v in recipe.settings.items()),
        }
        for suite in suites
        for recipe in suite.recipes()
    ]  # fmt: skip


SUITES: Mapping[str, Suite] = {
    suite.name: suite for suite in (Suite("quick", "a minute", {"fgsm": None, "pgd": None, "pgd-l2": None}),)
}
