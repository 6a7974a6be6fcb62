import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks.craft import ProbabilitiesWarning, craft
from attacks.methods.fast_minimum_norm import within_l1
from attacks.recipes import APGD, RECIPES, Recipe
from detector.batches import to_tensor
from detector.errors import RequestError
from detector.network.decouple import decouple
from detector.network.networks import build_network
from tests.oracles import MeanBoundary, NearestCorner, NeverFooled, WeightedSum, grey_images

PIXELS = 144
# What takes thousands of queries is tried with fewer: the code is the same.
SHORT = {
    "autoattack": {"steps": 20, "targets": 2, "queries": 200},
    "apgd": {"steps": 30},
    "square": {"queries": 500},
    "hopskipjump": {"steps": 3},
    "onepixel": {"pixels": 2, "steps": 2, "population": 8},
    "ead": {"steps": 50},
    "fmn": {"steps": 60},
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


def network_with_hills():
    """Two classes, the second far from any image; the loss has many hills."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 32), nn.Tanh(), nn.Linear(32, 2)).eval()
    with torch.no_grad():
        network[1].weight *= 40
        network[3].bias += torch.tensor([4.0, -4.0])
    return network


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


nearest = pytest.mark.parametrize("name", ["cw", "deepfool", "ddn", "cw-targeted"])
TRUE_L2 = pytest.mark.parametrize(("level", "gap"), [(0.47, 0.03), (0.4, 0.1), (0.0, 0.03), (0.97, 0.02)])


@nearest
@TRUE_L2
def test_the_smallest_change_is_within_a_quarter_of_the_true_distance(name, level, gap):
    images = grey_images(level)

    crafted = attack(RECIPES[name], MeanBoundary(level + gap), images, torch.zeros(4, dtype=torch.long))

    assert crafted.fooled.all()
    assert (crafted.l2 <= 1.25 * gap * PIXELS**0.5).all()


@nearest
def test_of_several_boundaries_the_nearest_is_found(name):
    images = torch.tensor([[0.2, 0.2], [0.2, 0.6], [0.45, 0.1], [0.0, 0.0]])
    images = torch.cat([images, torch.full((4, 34), 0.5)], dim=1).view(4, 1, 6, 6)
    first, second = 0.5 - images.flatten(1)[:, 0], 0.7 - images.flatten(1)[:, 1]
    targets = torch.tensor([2, 1, 2, 1]) if name == "cw-targeted" else None
    true = torch.minimum(first, second) if targets is None else torch.where(targets == 1, first, second)

    crafted = craft(RECIPES[name], NearestCorner(), images, torch.zeros(4, dtype=torch.long), targets=targets)

    assert crafted.reached.all()
    assert (crafted.l2 <= 1.25 * true.numpy() + 1 / 255).all()


@pytest.mark.parametrize("gap", [0.02, 0.1])
def test_decisions_alone_lead_within_a_quarter_of_the_true_distance(gap):
    images = grey_images(0.4, count=2, size=6)

    crafted = craft(RECIPES["hopskipjump"], MeanBoundary(0.4 + gap), images, torch.zeros(2, dtype=torch.long))

    assert crafted.fooled.all()
    assert (crafted.l2 <= 1.25 * gap * 6).all()


@pytest.mark.parametrize("summing", ["ead", "fmn-l1"])
def test_the_smallest_sum_and_number_of_changes_are_found_too(summing):
    weights = torch.linspace(0.1, 1, 36)
    network, labels = WeightedSum(weights, 19.0), torch.zeros(2, dtype=torch.long)
    images = levels(torch.full((2, 1, 6, 6), 230 / 255))
    gap = 19.0 - 230 / 255 * weights.sum().item()
    room = 25 / 255 * weights.flip(0).cumsum(0)  # what the steepest 1, 2, ... values can do, each from 230 to 255

    by_sum = craft(RECIPES[summing], network, images, labels)
    by_number = craft(RECIPES["sparsefool"], network, images, labels)

    fewest = int((room < gap).sum()) + 1
    least = 25 / 255 * (fewest - 1) + (gap - room[fewest - 2].item()) / weights[-fewest].item()
    assert by_sum.fooled.all()
    assert (by_sum.l1 <= 1.25 * least).all()
    assert by_number.fooled.all()
    assert (by_number.l0 <= 1.25 * fewest).all()


def test_changes_are_projected_onto_the_l1_ball_and_the_box_as_by_hand():
    changes = torch.tensor([[3.0, -1.0, 0.5, 0.0], [0.9, -0.4, 0.1, 0.0], [0.1, -0.2, 0.0, 0.3], [1.0, 2.0, -3.0, 4.0]])
    images = torch.tensor([0.25, 0.75, 0.5, 0.0]).expand(4, 4)
    radius = torch.tensor([1.0, 0.5, 1.0, float("inf")])

    projected = within_l1(changes.view(4, 1, 2, 2), radius, images.view(4, 1, 2, 2)).view(4, 4)

    # The first value may rise by 0.75 at most: 0.75 is taken off each change, so that the second has 0.25 left.
    assert torch.allclose(projected[0], torch.tensor([0.75, -0.25, 0.0, 0.0]), atol=1e-6)
    # 0.4 is taken off, and nothing is left of the second.
    assert torch.allclose(projected[1], torch.tensor([0.5, 0.0, 0.0, 0.0]), atol=1e-6)
    assert torch.equal(projected[2], changes[2])
    assert torch.equal(projected[3], torch.tensor([0.75, 0.25, -0.5, 1.0]))


@pytest.mark.parametrize(
    "name", [recipe.name for recipe in RECIPES.values() if recipe.norm == "linf" and recipe.budget]
)
@pytest.mark.parametrize("share", [0.75, 1.25])
def test_budget_attacks_succeed_exactly_when_the_budget_allows_it(name, share):
    recipe = short(RECIPES[name])
    # On levels of 8 bits: from 100 the boundary lies `share` of the budget away, half a level short of the next level.
    away = max(round(recipe.budget * 255 * share), 1) - 0.5 + (1 if share > 1 else 0)
    images = levels(torch.full((3, 1, 4, 4), 100 / 255))

    crafted = attack(recipe, MeanBoundary((100 + away) / 255), images, torch.zeros(3, dtype=torch.long))

    assert crafted.fooled.tolist() == [share < 1] * 3


def test_a_budget_below_one_level_allows_nothing():
    images = levels(torch.full((1, 1, 4, 4), 100 / 255))
    tiny = replace(RECIPES["pgd"], budget=0.5 / 255)

    crafted = craft(tiny, MeanBoundary(100.2 / 255), images, torch.zeros(1, dtype=torch.long))

    assert not crafted.fooled.any()
    assert crafted.linf[0] == 0


def test_targeted_attacks_reach_their_target_and_say_so(victim):
    images, labels = victim.images[:20], victim.labels[:20]

    crafted = craft(RECIPES["cw-targeted"], victim.network, images, labels)

    assert crafted.reached.mean() >= 0.95
    assert (crafted.predicted[crafted.reached] == crafted.targets[crafted.reached]).all()
    assert (crafted.targets != labels.numpy()).all()
    assert len(set(crafted.targets)) > 4


def test_rules_choose_targets_by_what_the_network_says():
    logits = torch.tensor([[0.0, 5.0, 3.0, 1.0], [9.0, 1.0, 0.0, 2.0]])
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    network[1].weight.data.zero_()
    network[1].bias.data = logits[0]
    stands = Recipe("stands", "linf", 1.0, lambda eps: lambda problem: problem.images)
    images, labels = torch.zeros(1, 1, 4, 4), torch.tensor([1])

    found = {
        rule: craft(replace(stands, target=rule), network, images, labels).targets[0]
        for rule in ("runner-up", "least-likely", "random")
    }

    assert (found["runner-up"], found["least-likely"]) == (2, 0)
    assert found["random"] in (0, 2, 3)


def test_a_larger_budget_and_more_steps_never_hurt_and_reach_everything(victim):
    network, images, labels = victim.network, victim.images[:60], victim.labels[:60]

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
    network, images, labels = victim.network, victim.images[:60], victim.labels[:60]

    white = craft(RECIPES["pgd"], network, images, labels)
    transferred = craft(RECIPES["pgd"], victim.bundle.backbone(), images, labels)

    sent = network(to_tensor(transferred.pixels, torch.device("cpu"))).argmax(dim=1) != labels
    assert white.fooled.mean() >= sent.float().mean().item()


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


class Flattening(nn.Module):
    """Flattens by `view`, as many networks do, which takes no empty batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, images):
        return self.linear(images.view(images.size(0), -1))


@every_recipe
def test_a_network_that_takes_no_empty_batch_is_attacked_too(recipe):
    network, images = Flattening(), levels(torch.rand(4, 1, 6, 6))
    with pytest.raises(RuntimeError):
        network(images[:0])

    crafted = attack(recipe, network, images, network(images).argmax(dim=1))

    assert crafted.pixels.shape == (4, 6, 6, 1)


def test_what_is_not_finite_is_neither_judged_nor_stored():
    lost = Recipe("lost", "linf", 1.0, lambda eps: lambda problem: problem.images * float("nan"))

    with pytest.raises(RequestError, match="expected finite pixels of lost, got some that are not"):
        craft(lost, MeanBoundary(), grey_images(0.4), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.full((1, 1, 6, 6), 1.5), [0], r"expected pixels in \[0, 1\], got 1.5 to 1.5"),
        (torch.full((1, 1, 6, 6), -0.1), [0], r"expected pixels in \[0, 1\], got -0.1 to -0.1"),
        (torch.full((1, 1, 6, 6), float("nan")), [0], r"expected pixels in \[0, 1\], got nan"),
        (torch.full((1, 1, 6, 6), float("inf")), [0], r"expected pixels in \[0, 1\], got inf"),
        (torch.zeros(0, 1, 6, 6), [], "expected images for fgsm to attack, got none"),
        (torch.zeros(1, 1, 6, 6), [2], "expected labels from 0 to 1, got 2 to 2"),
        (torch.zeros(1, 1, 6, 6), [-1], "got -1 to -1"),
    ],
)
def test_bad_images_and_labels_are_refused(images, labels, message):
    with pytest.raises(RequestError, match=message):
        craft(RECIPES["fgsm"], MeanBoundary(), images, torch.tensor(labels))


@pytest.mark.parametrize(
    ("norm", "budget"), [("linf", 0), ("linf", 300), ("linf", float("nan")), ("l2", -1), ("l2", 0)]
)
def test_a_budget_that_no_change_can_have_is_refused(norm, budget):
    with pytest.raises(RequestError, match="expected a budget above 0.* for the attack odd, got"):
        Recipe("odd", norm, budget, lambda eps: lambda problem: problem.images)


def test_a_budget_larger_than_any_change_of_these_images_is_refused():
    wide = replace(RECIPES["pgd-l2"], budget=300)

    with pytest.raises(
        RequestError, match="expected a budget of at most 6 for pgd-l2 .l2. on images of 36 values, got 300"
    ):
        craft(wide, MeanBoundary(), grey_images(0.4, size=6), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([1, 0, 1, 1], "expected a target that differs from the right label, got 0 for both"),
        ([1, 2, 1, 1], "expected targets from 0 to 1, got 1 to 2"),
    ],
)
def test_a_target_that_is_the_label_or_no_class_is_refused(targets, message):
    with pytest.raises(RequestError, match=message):
        craft(RECIPES["pgd-targeted"], MeanBoundary(), grey_images(0.4), torch.zeros(4, dtype=torch.long),
              targets=torch.tensor(targets))  # fmt: skip


def test_attacks_that_need_more_than_the_network_say_what():
    images, labels = grey_images(0.4), torch.zeros(4, dtype=torch.long)

    with pytest.raises(RequestError, match="expected a plain backbone for pgd-transfer to work on, got none"):
        craft(RECIPES["pgd-transfer"], MeanBoundary(), images, labels)
    with pytest.raises(RequestError, match="expected a detector for knows to evade, got none; run `pathguard fit`"):
        craft(Recipe("knows", "linf", 0.1, lambda eps: None, knows_detector=True), MeanBoundary(), images, labels)
    with pytest.raises(RequestError, match="expected a target for JSMA"):
        craft(replace(RECIPES["jsma"], target=None), MeanBoundary(), images, labels)
    for untargeted in ("hopskipjump", "autoattack"):
        with pytest.raises(RequestError, match=f"expected no target for the attack {untargeted}"):
            replace(RECIPES[untargeted], target="random")


def test_an_image_that_the_backbone_alone_gets_wrong_is_attacked_all_the_same():
    images, labels = grey_images(0.45), torch.zeros(4, dtype=torch.long)

    crafted = craft(RECIPES["fgsm-transfer"], MeanBoundary(0.47), images, labels, backbone=MeanBoundary(0.44))

    assert crafted.fooled.all()


def test_of_several_restarts_the_image_of_the_highest_loss_is_kept():
    def losses(restarts):
        recipe = replace(RECIPES["apgd-ce"], settings={**APGD, "steps": 3, "restarts": restarts})
        network, images = network_with_hills(), levels(torch.rand(6, 1, 12, 12, generator=torch.manual_seed(5)))
        labels = network(images).argmax(dim=1)
        crafted = craft(recipe, network, images, labels, 0)
        assert not crafted.fooled.any()
        with torch.no_grad():
            return F.cross_entropy(network(to_tensor(crafted.pixels, torch.device("cpu"))), labels, reduction="none")

    assert (losses(4) >= losses(1) - 1e-6).all()
    assert (losses(4) > losses(1) + 1e-6).any()


def test_a_network_that_gives_probabilities_is_warned_of_once():
    network = nn.Sequential(MeanBoundary(), nn.Softmax(dim=1))

    with pytest.warns(ProbabilitiesWarning, match="expected logits, got probabilities .*gradients vanish") as warned:
        craft(RECIPES["fgsm"], network, grey_images(0.4), torch.zeros(4, dtype=torch.long))

    assert len(warned) == 1


def test_a_transfer_attack_works_on_the_backbone_and_is_judged_on_the_network():
    network, backbone = MeanBoundary(0.5), MeanBoundary(0.9)
    images = grey_images(0.45)

    crafted = craft(RECIPES["pgd-transfer"], network, images, torch.zeros(4, dtype=torch.long), backbone=backbone)

    assert crafted.fooled.tolist() == [False] * 4  # 8/255 is not enough for either
    assert crafted.gradients.tolist() == [10] * 4
    nearer = craft(RECIPES["pgd-transfer"], MeanBoundary(0.47), images, torch.zeros(4, dtype=torch.long),
                   backbone=backbone)  # fmt: skip
    assert nearer.fooled.all()


def test_frozen_gates_are_a_recipe_of_their_own():
    network = decouple(build_network("resnet8", 1, 10)).eval()
    images = torch.rand(4, 1, 8, 8)
    labels = network(images).argmax(dim=1)

    seen, overlooked = (craft(replace(RECIPES["fgsm"], gates=gates), network, images, labels).pixels
                        for gates in ("straight-through", "frozen"))  # fmt: skip
    with network.frozen_gates():
        by_hand = craft(RECIPES["fgsm"], network, images, labels).pixels

    assert np.array_equal(overlooked, by_hand)
    assert not np.array_equal(seen, overlooked)
    assert not any(gate.frozen for gate in network.gates())


class Steep(nn.Module):
    """Class 1 where the mean pixel exceeds 0.5, its logit so curved that DeepFool takes several steps; class 2 lies
    `behind` it everywhere."""

    def __init__(self, behind):
        super().__init__()
        self.behind = behind

    def forward(self, images):
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([(40 * (0.5 - mean)).exp() - 1, 0 * mean, 0 * mean - self.behind], dim=1)


def test_deepfool_takes_no_gradient_of_a_class_far_behind_another():
    images, labels = grey_images(0.4, 2), torch.zeros(2, dtype=torch.long)
    near, far = (craft(RECIPES["deepfool"], Steep(behind), images, labels) for behind in (0.01, 1000.0))

    assert np.array_equal(near.pixels, far.pixels)
    assert near.fooled.all()
    assert (far.gradients < near.gradients).all()


def test_every_gradient_of_cw_is_followed_by_a_step_and_the_first_is_that_of_the_clean_image():
    settings = {**RECIPES["cw"].settings, "steps": 7, "searches": 2, "tries": 2, "patience": 2.0}
    images, labels = grey_images(122 / 255, 2), torch.zeros(2, dtype=torch.long)

    crafted = craft(replace(RECIPES["cw"], settings=settings), MeanBoundary(0.5), images, labels)

    assert crafted.fooled.all()
    assert crafted.gradients.tolist() == [1 + 2 * 6] * 2
