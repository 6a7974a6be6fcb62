from dataclasses import replace

import numpy as np
import pytest
import torch

from attacks.adaptive.defence import Defence, Guides, Seen
from attacks.evaluation import adaptive
from attacks.evaluation.adaptive import ANY, rows_of_withstood, withstand
from attacks.evaluation.protocol import Trial

ADAPTIVE = Trial(6, 40, 2, {"adaptive-selective": {}, "adaptive-hopskipjump": {"steps": 7}}, (4, 8))


class Done:
    """What an attack did: as many of the images reached, and misread, as told."""

    def __init__(self, images, reached, fooled):
        self.reached, self.fooled = (np.arange(images) < count for count in (reached, fooled))


@pytest.fixture
def found(victim, digits, monkeypatch):
    """Selective PGD evades 3 images at 4/255 and 1 at 8/255; HopSkipJump, which is given 2 images, none; PGD misleads
    4 images at 4/255 and 2 at 8/255."""
    recipes = [
        replace(recipe, images=2) if recipe.name == "adaptive-hopskipjump" else recipe for recipe in adaptive.ADAPTIVE
    ]

    def craft(recipe, _network, images, *_args, **_more):
        small = recipe.budget == 4 / 255
        if recipe.name == "pgd":
            return Done(len(images), 0, 4 if small else 2)
        reached = 0 if recipe.name == "adaptive-hopskipjump" else 3 if small else 1
        return Done(len(images), reached, reached)

    monkeypatch.setattr(adaptive, "ADAPTIVE", recipes)
    monkeypatch.setattr(adaptive, "craft", craft)
    none = torch.zeros(0)
    defence = Defence(lambda _: Seen(none, none, none), lambda _: (none, none), 0.0, 1.0, True, 1.0,
                      Guides(none, none, none))  # fmt: skip
    rows = rows_of_withstood(withstand(victim.network, digits.test, defence, ADAPTIVE, 1.0, 0))
    return {(row["attack"], row["budget / 255"]): row for row in rows}


def test_what_succeeded_within_a_smaller_budget_counts_within_a_larger_one(found):
    for name in ("adaptive-selective", ANY):
        assert found[name, 4]["robust accuracy"] == found[name, 8]["robust accuracy"] == 0.5
    assert found[ANY, 8]["detector off"] == pytest.approx(2 / 6)


def test_points_are_added_by_the_detector_against_all_attacks_and_not_against_one(found):
    assert found["adaptive-selective", 8]["points added"] is None
    assert found["adaptive-selective", 8]["detector off"] is None
    assert found[ANY, 8]["points added"] == pytest.approx(100 * (3 - 2) / 6)


def test_each_row_says_how_long_its_attack_searched_and_how_many_images_it_tried(found):
    assert found["adaptive-selective", 4]["settings"] == "steps 10, restarts 1"
    assert found["adaptive-selective", 8]["settings"] == "steps 40, restarts 2"
    assert ("adaptive-hopskipjump", 4) not in found
    assert found["adaptive-hopskipjump", 8]["settings"] == "steps 7, restarts 2, queries 100"
    assert found["adaptive-hopskipjump", 8]["images"] == 2
    assert (found[ANY, 8]["images"], found[ANY, 8]["images tried by all"]) == (6, 2)
    assert found[ANY, 4]["images tried by all"] == 6
