"""Every adaptive attack against detectors that can be evaded in one known way, or not at all."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch

from attacks.adaptive.defence import Defence
from attacks.adaptive.suite import ADAPTIVE, ADAPTIVE_DEEP
from attacks.craft import craft
from attacks.draws import Draws
from attacks.problem import Problem, Victim
from attacks.recipes import RECIPES
from detector.errors import RequestError
from tests.oracles import MeanBoundary, grey_images, halves_watched

FEW = {"steps": 20, "restarts": 2, "weights": 3, "queries": 300}
EPS = 16 / 255
GREY = 102 / 255


def small(recipe, **settings):
    few = {name: value for name, value in {**FEW, **settings}.items() if name in recipe.settings}
    return replace(recipe, budget=EPS, settings={**recipe.settings, **few})


every_attack = pytest.mark.parametrize("recipe", [small(recipe) for recipe in ADAPTIVE], ids=lambda recipe: recipe.name)


def network_and_images(distance):
    """The boundary lies `distance` above the images' grey, in budgets; all images are of class 0."""
    return MeanBoundary(GREY + distance * EPS), grey_images(GREY, 3), torch.zeros(3, dtype=torch.long)


def guides():
    """Images of class 1 whose left half is as it should be: far from the grey ones, and in few columns, so that what is
    left of them within the budget is no way round."""
    images = grey_images(GREY, 6)
    images[..., -2:] = torch.linspace(0.8, 1.0, 6)[:, None, None, None]
    return images


@every_attack
def test_goes_round_a_detector_in_the_one_way_there_is(recipe):
    network, images, labels = network_and_images(distance=0.35)
    defence = halves_watched(network, GREY + 0.05 * EPS, guides())

    crafted = craft(recipe, network, images, labels, watcher=defence)

    assert crafted.reached.all()
    assert crafted.fooled.all()
    assert not crafted.flagged.any()
    assert (crafted.scores <= 0).all()
    assert (crafted.linf <= EPS + 1e-6).all()


def test_an_attack_that_does_not_know_the_detector_is_flagged_there():
    network, images, labels = network_and_images(distance=0.35)
    defence = halves_watched(network, GREY + 0.05 * EPS, guides())

    crafted = craft(replace(RECIPES["pgd"], budget=EPS), network, images, labels)

    points = torch.from_numpy(crafted.pixels).permute(0, 3, 1, 2) / 255
    assert crafted.fooled.all()
    assert (defence.judge(points)[1] > 0).all()


@every_attack
def test_has_no_success_where_there_is_no_way_round(recipe):
    network, images, labels = network_and_images(distance=0.7)
    defence = halves_watched(network, GREY + 0.05 * EPS, guides())

    crafted = craft(recipe, network, images, labels, watcher=defence)

    assert not crafted.reached.any()
    assert (crafted.flagged | ~crafted.fooled).all()
    assert (crafted.linf <= EPS + 1e-6).all()


@every_attack
def test_success_is_what_the_real_detector_says_and_not_the_surrogate(recipe):
    network, images, labels = network_and_images(distance=0.7)
    defence = halves_watched(network, GREY + 0.05 * EPS, guides(), surrogate_sees=False)

    assert not craft(recipe, network, images, labels, watcher=defence).reached.any()


@every_attack
def test_a_detector_that_flags_nothing_leaves_the_plain_attack(recipe):
    network, images, labels = network_and_images(distance=0.4)
    defence = halves_watched(network, GREY, guides(), blind=True)

    assert craft(recipe, network, images, labels, watcher=defence).reached.all()


@every_attack
def test_an_image_that_has_evaded_costs_nothing_more(recipe):
    network, images, labels = network_and_images(distance=0.1)
    images[2] = GREY - 10 * EPS / 16  # this one takes longer, or never gets there
    defence = halves_watched(network, GREY + 0.4 * EPS, guides())

    crafted = craft(recipe, network, images, labels, watcher=defence)

    assert crafted.reached[:2].all()
    assert (crafted.forwards[:2] < crafted.forwards[2]).all()


@every_attack
def test_a_result_does_not_depend_on_its_neighbours(recipe):
    network, images, labels = network_and_images(distance=0.35)
    images = images + torch.tensor([0.0, 1.0, 3.0])[:, None, None, None] / 255
    defence = halves_watched(network, GREY + 0.05 * EPS, guides())
    ids = np.array([7, 8, 9])

    together = craft(recipe, network, images, labels, 3, ids, watcher=defence)
    alone = [
        craft(recipe, network, images[i : i + 1], labels[i : i + 1], 3, ids[i : i + 1], watcher=defence)
        for i in range(3)
    ]

    assert np.array_equal(together.pixels, np.concatenate([one.pixels for one in alone]))
    assert together.forwards.tolist() == [int(one.forwards[0]) for one in alone]
    assert together.gradients.tolist() == [int(one.gradients[0]) for one in alone]


@every_attack
def test_needs_a_detector(recipe):
    network, images, labels = network_and_images(distance=0.35)

    with pytest.raises(RequestError, match=f"expected a detector for {recipe.name} to evade, got none"):
        craft(recipe, network, images, labels)
    draws = Draws([0, 1, 2], images.device, images.dtype)
    with pytest.raises(RequestError, match="expected a detector to evade, got none"):
        recipe.attack()(Problem(Victim(network, 3), images, labels, None, draws, np.arange(3)))


def test_the_deep_ones_are_the_same_with_more_steps_on_fewer_images():
    assert [recipe.name for recipe in ADAPTIVE_DEEP] == [
        "adaptive-joint-deep",
        "adaptive-selective-deep",
        "adaptive-orthogonal-deep",
        "adaptive-path-deep",
    ]
    assert all(recipe.settings["steps"] == 1000 and recipe.images == 50 for recipe in ADAPTIVE_DEEP)
    assert all(recipe.knows_detector and recipe.costly and recipe.images in (50, 200) for recipe in ADAPTIVE)


@pytest.mark.parametrize("recipe", [*RECIPES.values(), *ADAPTIVE, *ADAPTIVE_DEEP], ids=lambda recipe: recipe.name)
def test_every_setting_of_an_attack_is_stored(recipe):
    said = {"budget", "norm", "ask", *recipe.settings}  # what Square asks is no setting

    if recipe.make.__name__ != "<lambda>":
        assert set(inspect.signature(recipe.make).parameters) <= said
    elif recipe.settings and recipe.kind == recipe.name:  # one class serves several kinds, which say the rest
        of_kind = {"norm", "start", "momentum", "loss"} | ({"steps", "step"} if "fgsm" in recipe.kind else set())
        assert set(vars(recipe.attack())) <= said | of_kind


def test_a_defence_is_frozen():
    network, _, _ = network_and_images(distance=0.35)
    defence = halves_watched(network, GREY, guides())

    assert isinstance(defence, Defence)
    with pytest.raises(AttributeError):
        defence.threshold = 1.0
