import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from attacks.craft import craft
from attacks.recipes import RECIPES, Recipe
from attacks.selection import rightly_classified
from detector.batches import to_tensor
from detector.decouple import decouple
from detector.errors import RequestError
from detector.networks import build_network
from detector.schedule import Schedule
from detector.stages import make_backbone, make_decoupled
from tests.oracles import MeanBoundary, NeverFooled, grey_images

PIXELS = 144
# What takes thousands of queries is tried with fewer: the code is the same.
SHORT = {
    "autoattack": {"steps": 20, "targets": 2, "queries": 200},
    "apgd": {"steps": 30},
    "square": {"queries": 500},
    "hopskipjump": {"steps": 3},
    "onepixel": {"pixels": 2, "steps": 2, "population": 8},
    "ead": {"steps": 50},
    "ddn": {"steps": 60},
    "cw": {"steps": 30, "searches": 4},
    "jsma": {"share": 1.0},
}
# Attacks by luck, or in steps so coarse that the oracle's boundary is no test of them: success on it is not promised.
NO_PROMISE = {"onepixel"}


def short(recipe: Recipe) -> Recipe:
    settings = next((SHORT[kind] for kind in SHORT if recipe.name.startswith(kind)), {})
    return replace(recipe, settings={**recipe.settings, **settings})


def of(recipes: Iterable[Recipe]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("recipe", [short(r) for r in recipes], ids=lambda recipe: recipe.name)


ON_GRID = re.compile(r"-[124]$")
every_recipe = of(recipe for recipe in RECIPES.values() if not ON_GRID.search(recipe.name))
bounded = of(recipe for recipe in RECIPES.values() if recipe.budget is not None)


def distance_in_pixel_levels(recipe: Recipe, share: float) -> float:
    """How far the mean pixel is from the boundary when the boundary lies at `share` times the recipe's budget."""
    budget = recipe.budget if recipe.budget is not None else 0.3
    return share * (budget if recipe.norm == "linf" else budget / PIXELS**0.5)


def levels(images):
    """As they come from 8 bits."""
    return (images * 255).round() / 255


def attack(recipe, network, images, labels, **rest):
    """Two classes leave one target, and the oracle is its own backbone."""
    targets = 1 - labels if recipe.target and network(images[:1]).shape[1] == 2 else None
    return craft(recipe, network, images, labels, targets=targets, backbone=network, **rest)


@every_recipe
def test_reaches_a_boundary_inside_the_budget(recipe):
    if recipe.name in NO_PROMISE:
        pytest.skip("no promise")
    images = grey_images(0.5 - distance_in_pixel_levels(recipe, 0.5))

    crafted = attack(recipe, MeanBoundary(0.5), images, torch.zeros(4, dtype=torch.long))

    assert crafted.fooled.all()
    assert crafted.reached.all()


@bounded
def test_cannot_reach_a_boundary_outside_the_budget(recipe):
    images = grey_images(0.5 - distance_in_pixel_levels(recipe, 1.2))

    crafted = attack(recipe, MeanBoundary(0.5), images, torch.zeros(4, dtype=torch.long))

    assert not crafted.fooled.any()


@bounded
def test_what_is_stored_keeps_to_the_budget(recipe):
    network = build_network("resnet8", 1, 10).eval()
    images = levels(torch.rand(6, 1, 8, 8))

    crafted = attack(recipe, network, images, network(images).argmax(dim=1))

    assert ((crafted.linf if recipe.norm == "linf" else crafted.l2) <= recipe.budget + 1e-6).all()


@every_recipe
def test_a_network_that_cannot_be_fooled_is_not_said_to_be(recipe):
    crafted = attack(recipe, NeverFooled(), grey_images(0.4, size=6), torch.zeros(4, dtype=torch.long))

    assert not crafted.fooled.any()


@pytest.mark.parametrize("name", ["cw", "deepfool"])
@pytest.mark.parametrize(("level", "gap"), [(0.47, 0.03), (0.4, 0.1), (0.0, 0.03), (0.97, 0.02)])
def test_the_smallest_change_is_within_a_quarter_of_the_true_distance(name, level, gap):
    images = grey_images(level)

    crafted = craft(RECIPES[name], MeanBoundary(level + gap), images, torch.zeros(4, dtype=torch.long))

    assert crafted.fooled.all()
    assert (crafted.l2 <= 1.25 * gap * PIXELS**0.5).all()


@pytest.fixture(scope="module")
def victim(digits, tmp_path_factory):
    """A small decoupled network that knows digits, and images that it gets right."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    schedule = Schedule(4, 64, 0.05, flip=False)
    bundle, _ = make_backbone("resnet8", digits, schedule, tmp_path_factory.mktemp("victim"), lambda _: None)
    bundle, _ = make_decoupled(bundle, digits, 0.7, "pathguard", schedule, bundle.folder, lambda _: None)
    network = bundle.network()
    images = digits.test.subset(rightly_classified(network, digits.test)).first(60)
    return bundle, network, to_tensor(images.pixels(slice(None)), torch.device("cpu")), torch.from_numpy(images.labels)


def test_a_larger_budget_and_more_steps_never_hurt_and_reach_everything(victim):
    _, network, images, labels = victim

    by_budget = [
        craft(replace(RECIPES["pgd"], budget=budget), network, images, labels).fooled.mean()
        for budget in (2 / 255, 8 / 255, 32 / 255, 1.0)
    ]
    by_steps = [
        craft(
            replace(RECIPES["pgd"], settings={**RECIPES["pgd"].settings, "steps": steps}), network, images, labels
        ).fooled.mean()
        for steps in (1, 5, 20)
    ]

    assert by_budget == sorted(by_budget)
    assert by_budget[-1] == 1.0
    assert by_steps == sorted(by_steps)


def test_knowing_the_network_is_no_worse_than_attacking_its_backbone(victim):
    bundle, network, images, labels = victim

    white = craft(RECIPES["pgd"], network, images, labels)
    transferred = craft(RECIPES["pgd"], bundle.backbone(), images, labels)

    sent = network(to_tensor(transferred.pixels, torch.device("cpu"))).argmax(dim=1) != labels
    assert white.fooled.mean() >= sent.float().mean().item()


@pytest.mark.parametrize("name", ["cw", "deepfool", "fgsm"])
def test_a_result_does_not_depend_on_its_neighbours(name):
    network = build_network("resnet8", 1, 10).eval()
    images = torch.rand(5, 1, 8, 8)
    labels = network(images).argmax(dim=1)

    together = craft(RECIPES[name], network, images, labels)
    alone = [craft(RECIPES[name], network, images[i : i + 1], labels[i : i + 1]) for i in range(5)]

    pixels = np.concatenate([one.pixels for one in alone])
    assert (np.abs(together.pixels.astype(int) - pixels) <= 1).mean() > 0.98
    assert together.fooled.tolist() == [bool(one.fooled[0]) for one in alone]


@every_recipe
def test_the_same_seed_gives_the_same_images(recipe):
    network = build_network("resnet8", 1, 10).eval()
    images = torch.rand(3, 1, 8, 8)
    labels = network(images).argmax(dim=1)

    one, two = (attack(recipe, network, images, labels, seed=7) for _ in range(2))

    assert np.array_equal(one.pixels, two.pixels)


def test_another_seed_gives_other_images_where_an_attack_draws_at_random():
    images = grey_images(0.5 - 0.9 * 8 / 255)
    labels = torch.zeros(4, dtype=torch.long)

    one, other = (craft(RECIPES["square"], MeanBoundary(0.5), images, labels, seed=seed).pixels for seed in (1, 2))

    assert not np.array_equal(one, other)


def test_norms_are_those_of_the_rounded_change():
    moves = Recipe("moves", "linf", 1.0, lambda eps: lambda problem: problem.images + 10.2 / 255)

    crafted = craft(moves, MeanBoundary(0.9), torch.full((1, 1, 6, 6), 100 / 255), torch.tensor([0]))

    assert crafted.linf[0] == pytest.approx(10 / 255)
    assert crafted.l2[0] == pytest.approx(10 / 255 * 6)
    assert crafted.l1[0] == pytest.approx(10 / 255 * 36, rel=1e-5)
    assert crafted.l0[0] == 36


def test_success_is_counted_after_rounding():
    barely = Recipe("barely", "linf", 1.0, lambda eps: lambda problem: problem.images + 0.4 / 255)
    images = torch.full((1, 1, 6, 6), 127 / 255)

    crafted = craft(barely, MeanBoundary(127.2 / 255), images, torch.tensor([0]))

    assert not crafted.fooled[0]


def test_attacks_see_the_gates_of_a_decoupled_network():
    network = decouple(build_network("resnet8", 1, 10)).eval()
    images = torch.rand(4, 1, 8, 8)
    labels = network(images).argmax(dim=1)

    seen = craft(RECIPES["fgsm"], network, images, labels)
    with network.frozen_gates():
        overlooked = craft(RECIPES["fgsm"], network, images, labels)

    assert not np.array_equal(seen.pixels, overlooked.pixels)


def test_mode_and_weights_are_as_before_even_after_an_error():
    def failing(eps):
        def attack(problem):
            assert not problem.network.network.training
            raise RuntimeError("broken attack")

        return attack

    network = build_network("resnet8", 1, 10).train()
    network.bn1.eval()
    with pytest.raises(RuntimeError, match="broken attack"):
        craft(Recipe("broken", "linf", 0.1, failing), network, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))

    assert network.training
    assert not network.bn1.training
    assert all(parameter.requires_grad for parameter in network.parameters())


@every_recipe
def test_images_that_are_not_contiguous_are_taken(recipe):
    network = build_network("resnet8", 1, 10).eval()
    images = torch.rand(2, 8, 8, 1).permute(0, 3, 1, 2)

    assert attack(recipe, network, images, network(images).argmax(dim=1)).pixels.shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.full((1, 1, 6, 6), 1.5), [0], r"expected pixels in \[0, 1\], got 1.5 to 1.5"),
        (torch.full((1, 1, 6, 6), float("nan")), [0], r"expected pixels in \[0, 1\], got nan"),
        (torch.zeros(1, 1, 6, 6), [2], "expected labels from 0 to 1, got 2 to 2"),
        (torch.zeros(1, 1, 6, 6), [-1], "got -1 to -1"),
    ],
)
def test_bad_images_and_labels_are_refused(images, labels, message):
    with pytest.raises(RequestError, match=message):
        craft(RECIPES["fgsm"], MeanBoundary(), images, torch.tensor(labels))
