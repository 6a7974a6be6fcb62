from pathlib import Path

import pytest

from attacks.recipe_file import recipes_in
from attacks.recipe_tables import table_of_settings, table_of_suites, with_tables
from attacks.recipes import RECIPES
from attacks.suites import SUITES

DOCS = Path(__file__).parents[2] / "docs" / "attacks.md"


def test_the_docs_have_the_tables_of_the_code():
    text = DOCS.read_text(encoding="utf-8")

    assert with_tables(text) == text, "run `python -m attacks.recipe_tables docs/attacks.md`"


def test_every_member_of_every_suite_stands_in_the_table_with_its_images():
    lines = table_of_suites().splitlines()

    assert any(line.startswith("| `autoattack` | L-inf | 8/255 |") and "| 200 |" in line for line in lines)
    for suite in SUITES.values():
        if suite.name != "corruptions":
            assert sum(f"| `{name}` |" in line for line in lines for name in suite.members) == len(suite.members)


def test_settings_are_told_once_for_all_epsilons():
    table = table_of_settings()

    assert "| `pgd` |" in table
    assert "| `pgd-2` |" not in table
    for recipe in RECIPES.values():
        if recipe.target or recipe.gates == "frozen" or recipe.source == "backbone":
            assert f"| `{recipe.name}` |" in table


def test_a_text_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="expected <!-- purposes: made by"):
        with_tables("no markers")


def test_the_example_of_the_docs_describes_recipes(tmp_path):
    example = DOCS.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "mine.toml").write_text(example)

    gentle, frozen, targeted, transfer, adaptive = recipes_in(tmp_path / "mine.toml")

    assert (gentle.budget, gentle.settings["steps"]) == (3 / 255, 40)
    assert frozen.gates == "frozen"
    assert (targeted.target, targeted.images) == ("runner-up", 500)
    assert transfer.source == "backbone"
    assert adaptive.settings["heaviest"] == 100
