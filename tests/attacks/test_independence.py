"""What becomes of an image depends on the image, its seed and nothing else: no neighbour, no order, no batch size."""

import numpy as np
import pytest
import torch

from attacks.craft import craft
from attacks.draws import Draws, seed_of
from attacks.problem import Problem, Victim
from attacks.recipes import RECIPES
from tests.attacks.test_craft import attack, every_recipe, levels, short
from tests.oracles import MeanBoundary, NearestCorner, grey_images

IDS = np.array([7, 3, 90, 4])


def one_by_one(recipe, network, images, labels, **rest):
    return [
        attack(recipe, network, images[i : i + 1], labels[i : i + 1], ids=IDS[i : i + 1], **rest)
        for i in range(len(images))
    ]


@every_recipe
def test_on_an_oracle_each_image_comes_out_bit_for_bit_as_if_it_were_alone(recipe):
    # Some are fooled at once, some late and some never, so that images leave the batch at different times.
    images = torch.tensor([0.49, 0.497, 0.3, 0.45], dtype=torch.float64)[:, None, None, None].expand(4, 1, 6, 6)
    images = levels(images + torch.linspace(0, 0.02, 36, dtype=torch.float64).view(1, 1, 6, 6))
    network, labels = MeanBoundary(0.52).double(), torch.zeros(4, dtype=torch.long)

    together = attack(recipe, network, images, labels, ids=IDS)
    alone = one_by_one(recipe, network, images, labels)

    for field in (
        "pixels",
        "predicted",
        "fooled",
        "reached",
        "linf",
        "l2",
        "l1",
        "l0",
        "forwards",
        "gradients",
        "seeds",
    ):
        apart = np.concatenate([getattr(one, field) for one in alone])
        assert np.array_equal(getattr(together, field), apart), field


@every_recipe
def test_of_three_classes_each_image_comes_out_as_if_it_were_alone(recipe):
    images = levels(torch.rand(4, 1, 4, 4, dtype=torch.float64) * 0.45)
    network, labels = NearestCorner().double(), torch.zeros(4, dtype=torch.long)

    together = attack(recipe, network, images, labels, ids=IDS)
    alone = one_by_one(recipe, network, images, labels)

    assert np.array_equal(together.pixels, np.concatenate([one.pixels for one in alone]))
    assert np.array_equal(together.gradients, np.concatenate([one.gradients for one in alone]))


@every_recipe
def test_the_order_of_a_batch_does_not_matter(recipe):
    images = levels(torch.rand(4, 1, 4, 4, dtype=torch.float64) * 0.45)
    network, labels = NearestCorner().double(), torch.zeros(4, dtype=torch.long)
    turned = np.array([2, 0, 3, 1])

    one = attack(recipe, network, images, labels, ids=IDS)
    other = attack(recipe, network, images[turned], labels, ids=IDS[turned])

    assert np.array_equal(one.pixels[turned], other.pixels)


@pytest.mark.parametrize(
    "name",
    [
        "pgd",
        "apgd-dlr",
        "square",
        "cw",
        "deepfool",
        "ead",
        "fmn-l1",
        "ddn",
        "sparsefool",
        "jsma",
        "autoattack",
        "hopskipjump",
    ],
)
def test_on_a_gated_network_in_float32_nearly_every_image_comes_out_as_if_it_were_alone(name, victim):
    recipe, ids = short(RECIPES[name]), np.arange(100)
    together = craft(recipe, victim.network, victim.images, victim.labels).pixels

    # Alone, by two, by three, by seventeen, by 77: what a neighbour could change would show.
    same = []
    for part in np.split(ids, [1, 3, 6, 23]):
        apart = craft(recipe, victim.network, victim.images[part], victim.labels[part], ids=part).pixels
        same += [np.array_equal(one, other) for one, other in zip(together[part], apart, strict=True)]

    assert np.mean(same) >= 0.99


def test_ddn_neither_depends_on_the_global_generator_nor_moves_it_where_gradients_vanish():
    made, images = [], grey_images(0.3)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        made.append(craft(RECIPES["ddn"], MeanBoundary(0.5, 2000.0), images, torch.zeros(4, dtype=torch.long)).pixels)
        assert torch.equal(torch.get_rng_state(), before)

    assert np.array_equal(*made)


def test_a_seed_belongs_to_an_image_and_a_run():
    seeds = {seed_of(seed, image) for seed in range(20) for image in range(20)}

    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(3, 5) == seed_of(3, 5)


def test_rows_draw_from_their_own_generators_whoever_draws_beside_them():
    def draws():
        return Draws([11, 22, 33], torch.device("cpu"), torch.float32)

    all_rows, last = torch.arange(3), torch.tensor([2])

    together, alone = draws(), draws()
    first = together.uniform(all_rows, 4, low=-1.0)
    second = together.normal(last, 2, 2)

    assert torch.equal(first[2], alone.uniform(last, 4, low=-1.0)[0])
    assert torch.equal(second, alone.normal(last, 2, 2))
    assert first.min() >= -1
    assert first.shape == (3, 4)
    assert draws().uniform(torch.tensor([], dtype=torch.long), 4).shape == (0, 4)


def test_each_pass_is_counted_for_the_images_that_take_part():
    network = MeanBoundary()
    victim = Victim(network, 3)
    rows = torch.tensor([0, 2, 2])
    points = torch.rand(3, 1, 4, 4).requires_grad_(True)

    logits = victim(points, rows)
    torch.autograd.grad(logits[:, 0].sum(), [points], retain_graph=True)
    torch.autograd.grad(logits[:, 1].sum(), [points])
    with torch.no_grad():
        victim(points[:1], rows[:1])

    assert victim.forwards.tolist() == [2, 0, 2]
    assert victim.gradients.tolist() == [2, 0, 4]


def test_an_image_that_is_fooled_costs_no_more():
    images = levels(torch.tensor([0.499, 0.2])[:, None, None, None].expand(2, 1, 6, 6))

    crafted = craft(RECIPES["pgd"], MeanBoundary(0.5), images, torch.zeros(2, dtype=torch.long))

    assert crafted.fooled.tolist() == [True, False]
    assert crafted.gradients[0] < crafted.gradients[1] == RECIPES["pgd"].settings["steps"]


def test_a_margin_below_zero_is_what_the_attack_wants():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])

    def problem(targets):
        labels, images = torch.tensor([1, 1]), torch.zeros(2, 1, 2, 2)
        return Problem(Victim(MeanBoundary(), 2), images, labels, targets, None, np.arange(2))

    assert problem(None).margin(logits, torch.arange(2)).tolist() == [1, 1]
    assert problem(torch.tensor([2, 0])).margin(logits, torch.arange(2)).tolist() == [1, 2]
    assert problem(torch.tensor([2, 0])).margin(logits, torch.tensor([1, 0])).tolist() == [2, 1]
    assert problem(None).is_goal(-logits, torch.arange(2)).tolist() == [True, True]
