import pytest

from attacks.recipe_file import recipes_in
from attacks.recipes import RECIPES
from attacks.suites import COSTLY_IMAGES, SUITES, recipe_named, recipes_named, suite_rows
from detector.errors import RequestError


def test_recipes_come_by_name_once_each_in_the_order_given():
    assert [recipe.name for recipe in recipes_named("pgd, fgsm,pgd")] == ["pgd", "fgsm"]


def test_a_suite_and_a_recipe_can_be_given_together():
    names = [recipe.name for recipe in recipes_named("quick,cw")]

    assert names == [*SUITES["quick"].members, "cw"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fgsm,pgdd", r"expected a suite \(quick, standard, .*got 'pgdd'; did you mean pgd"),
        (" ,", "got none"),
        ("noise-magic", "got 'noise-magic'"),
    ],
)
def test_an_unknown_name_is_told_in_one_line_with_the_nearest(text, message):
    with pytest.raises(RequestError, match=message) as caught:
        recipes_named(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_every_member_of_every_suite_is_there(suite):
    assert [recipe.name for recipe in suite.recipes()] == list(suite.members)


def test_the_full_suite_has_every_attack_and_runs_the_costly_ones_on_few_images():
    members = {recipe.name: recipe for recipe in SUITES["full"].recipes()}

    assert set(RECIPES) <= set(members)
    costly = {name for name, recipe in members.items() if recipe.images is not None}
    assert {"autoattack", "jsma", "hopskipjump"} <= costly
    assert all(members[name].images == COSTLY_IMAGES for name in costly)


def test_noise_comes_after_the_attack_whose_length_it_has():
    for suite in SUITES.values():
        names = list(suite.members)
        for recipe in suite.recipes():
            if recipe.matches:
                assert names.index(recipe.matches) < names.index(recipe.name)
                ours, its = suite.members[recipe.name], suite.members[recipe.matches]
                assert its is None or (ours is not None and ours <= its)


def test_noise_and_corruptions_are_no_attacks():
    assert not recipe_named("noise-pgd").is_attack
    assert not recipe_named("fog-3").is_attack
    assert recipe_named("adaptive-joint").knows_detector


def test_the_table_of_suites_has_a_row_for_each_member():
    rows = suite_rows([SUITES["standard"]])

    assert len(rows) == len(SUITES["standard"].members)
    row = next(row for row in rows if row["recipe"] == "pgd-2")
    assert (row["norm"], row["budget"], row["images"]) == ("linf", "2/255", "all")
    assert "steps 10" in row["settings"]
    assert next(row for row in rows if row["recipe"] == "cw")["images"] == "1000"


def written(tmp_path, text):
    (tmp_path / "own.toml").write_text(text)
    return tmp_path / "own.toml"


def test_a_file_describes_attacks_that_know_the_detector(tmp_path):
    (sweep,) = recipes_in(written(tmp_path, '[sweep]\nkind = "adaptive-joint"\nbudget = "4/255"\nheaviest = 100'))

    assert (sweep.budget, sweep.kind, sweep.knows_detector) == (4 / 255, "adaptive-joint", True)
    assert sweep.settings["heaviest"] == 100


def test_a_file_describes_recipes_that_start_from_ours(tmp_path):
    file = written(
        tmp_path,
        """
        [gentle]
        kind = "pgd"
        budget = "3/255"
        steps = 40
        source = "backbone"
        target = "random"
        images = 50

        [blind]
        kind = "bim"
        gates = "frozen"

        [my-cw]
        kind = "cw"
        searches = 9
        rate = 1
        """,
    )

    gentle, blind, strong = recipes_named(str(file))

    assert (gentle.name, gentle.norm, gentle.budget) == ("gentle", "linf", 3 / 255)
    assert gentle.settings == {**RECIPES["pgd"].settings, "steps": 40, "stop": False}  # for the backbone
    assert (gentle.gates, gentle.source, gentle.target, gentle.images) == ("straight-through", "backbone", "random", 50)
    assert (blind.gates, blind.source, blind.settings) == ("frozen", "decoupled", RECIPES["bim"].settings)
    assert strong.settings == {**RECIPES["cw"].settings, "searches": 9, "rate": 1.0}
    assert strong.budget is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[a]\nkind = "pgd"\nstpes = 4', r"expected keys of kind, budget, .*steps.* in \[a\] of .*own.toml, got stpes"),
        ('[a]\nkind = "magic"', "expected a kind in .*; got 'magic'"),
        ("[a]\nsteps = 4", "expected a kind in .*; got None"),
        ("[a]\nkind = 3", "expected a kind in .*; got 3"),
        ('kind = "pgd"', "got the key 'kind' outside of any"),
        ('[pgd]\nkind = "pgd"', "call it my-pgd"),
        ('[fog-3]\nkind = "pgd"', "call it my-fog-3"),
        ('[noise-pgd]\nkind = "pgd"', "call it my-noise-pgd"),
        ('["a/b"]\nkind = "pgd"', "expected a name of letters"),
        ('[a]\nkind = "pgd"\nbudget = 0', "expected a budget above 0 to 1 .* for the attack a, got 0"),
        ('[a]\nkind = "pgd"\nbudget = 300', "expected a budget above 0 to 1 .* got 300"),
        ('[a]\nkind = "pgd"\nbudget = "300/255"', "expected a budget above 0 to 1"),
        ('[a]\nkind = "pgd"\nbudget = nan', "expected a budget such as 0.03"),
        ('[a]\nkind = "pgd"\nbudget = "much"', "expected a budget such as 0.03 .* got 'much'"),
        ('[a]\nkind = "pgd"\nbudget = "1/0"', "expected a budget such as 0.03"),
        (f'[a]\nkind = "pgd"\nbudget = {"9" * 400}', "expected a budget such as 0.03"),
        ('[a]\nkind = "pgd"\nbudget = "1e400"', "expected a budget such as 0.03"),
        (f'[a]\nkind = "pgd"\nstep = {"9" * 400}', "expected a number from 0 for step"),
        ('[a]\nkind = "autoattack"\ntarget = "random"', "expected no target for the attack a"),
        ('[a]\nkind = "adaptive-joint"\nlightest = 11', "expected a lightest weight above 0 and up to 10, got 11"),
        ('[a]\nkind = "adaptive-joint"\nloss = "mine"', "expected a loss of margin, cross-entropy; got 'mine'"),
        ('[a]\nkind = "adaptive-joint"\ngates = "frozen"', "expected keys of kind, .*weights.*, got gates"),
        ('[a]\nkind = "cw"\nbudget = 1', "cw seeks the smallest change"),
        ('[a]\nkind = "pgd"\nsteps = 0', "expected a whole number from 1 for steps"),
        ('[a]\nkind = "pgd"\nsteps = 2.5', "expected a whole number from 1 for steps"),
        ('[a]\nkind = "pgd"\nstop = 1', "expected true or false for stop"),
        ('[a]\nkind = "pgd"\nstep = -1', "expected a number from 0 for step"),
        ('[a]\nkind = "pgd"\nimages = 0', "expected a number of images from 1"),
        ('[a]\nkind = "pgd"\ngates = "open"', "expected straight-through, frozen in the attack a, got 'open'"),
        ('[a]\nkind = "pgd"\ngates = "frozen"\nsource = "backbone"', "expected gates to freeze in the attack a"),
        ('[a]\nkind = "pgd"\ntarget = "next"', "expected random, runner-up, least-likely in the attack a"),
        ("[a", "expected TOML in .*own.toml"),
        ("", r"expected a \[NAME\] for each recipe"),
    ],
)
def test_a_mistake_in_a_file_is_told_in_one_line(tmp_path, text, message):
    with pytest.raises(RequestError, match=message) as caught:
        recipes_in(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(RequestError, match="expected a file of recipes in .*none.toml, got: No such file"):
        recipes_named(str(tmp_path / "none.toml"))
