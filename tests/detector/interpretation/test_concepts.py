from dataclasses import replace

import numpy as np
import pytest
import torch

from detector.datasets import Splits
from detector.interpretation.census import Census
from detector.interpretation.closing import class_accuracies, close_combinations
from detector.interpretation.concepts import (
    Combination,
    class_weights,
    find_combinations,
    judge_combinations,
)
from detector.network.decouple import GatedNet
from detector.network.gates import GateReading
from detector.paths.path_encoding import PathEncoding

LAYERS = {"first": 20, "second": 20}


def planted(images: int, seed: int) -> tuple[PathEncoding, np.ndarray]:
    """Filters are open at random, but for classes 0 and 1, whose images mostly open four filters of their own."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 4, images)
    bits = draws.random((images, 40)) < 0.5
    for label in (0, 1):
        has = (labels == label) & (draws.random(images) < 0.8)
        bits[np.ix_(has, range(10 * label, 10 * label + 4))] = True
        others = np.ix_(labels != label, range(10 * label, 10 * label + 4))
        bits[others] &= draws.random(bits[others].shape) < 0.6
    return PathEncoding(bits, LAYERS), labels


def test_planted_combinations_are_found():
    path, labels = planted(2000, 0)
    found = find_combinations(path, labels, 4, parts=1)
    of_zero = next(combination for combination in found if combination.label == 0)
    of_one = next(combination for combination in found if combination.label == 1)
    assert {0, 1, 2, 3} <= set(of_zero.filters)
    assert {10, 11, 12, 13} <= set(of_one.filters)


def test_a_combination_is_shared_by_enough_images_of_its_class():
    path, labels = planted(2000, 0)
    for combination in find_combinations(path, labels, 4):
        assert combination.shared_by(path.bits[labels == combination.label]).mean() >= 0.2


def test_a_planted_combination_is_purer_than_its_filters_and_than_chance_on_other_images():
    path, labels = planted(2000, 0)
    other, other_labels = planted(2000, 1)
    for purity in judge_combinations(find_combinations(path, labels, 4, parts=1), other, other_labels):
        if purity.combination.label in (0, 1):
            assert purity.purity > purity.single + 0.1
            assert purity.purity > purity.random + 0.25


def test_random_combinations_are_as_pure_as_the_class_is_common():
    path, labels = planted(4000, 0)
    (purity,) = judge_combinations([Combination((5, 6, 7), 3)], path, labels)
    assert purity.random == pytest.approx((labels == 3).mean(), abs=0.05)
    assert purity.purity == pytest.approx((labels == 3).mean(), abs=0.1)


def test_what_no_image_shares_has_no_purity():
    path, labels = planted(50, 0)
    bits = path.bits.copy()
    bits[:, 5] = False
    (purity,) = judge_combinations([Combination((4, 5), 0)], PathEncoding(bits, LAYERS), labels)
    assert purity.images == 0
    assert np.isnan(purity.purity)


def test_filters_that_are_open_for_all_classes_alike_weigh_nothing():
    path, labels = planted(3000, 0)
    bits = path.bits.copy()
    bits[:, 39] = True
    census = Census(LAYERS, 4)
    census.add(PathEncoding(bits, LAYERS), labels)
    weights = class_weights(census)
    assert (weights[:, 39] == 0).all()
    assert weights[0].argmax() in range(4)


class OneFilterForEachClass(torch.nn.Module):
    """Gate c lets the image's mean through where its first pixel says class c; the logits are what comes through."""

    class _Gate(torch.nn.Module):
        def forward(self, features: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, GateReading]:
            mask = torch.ones_like(features.mean(dim=(2, 3)))
            return output * mask[:, :, None, None], GateReading(mask, mask)

    def __init__(self) -> None:
        super().__init__()
        self.gates_ = torch.nn.ModuleList([self._Gate()])
        self.layers = {"only": 10}
        self.weight = torch.nn.Parameter(torch.ones(1))

    def gates(self) -> list[torch.nn.Module]:
        return list(self.gates_)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        label = (images[:, 0, 0, 0] * 255).round().long()
        features = torch.nn.functional.one_hot(label, 10).float()[:, :, None, None]
        gated, _ = self.gates_[0](features, features)
        # Without its filter an image is taken for the next class.
        following = torch.nn.functional.one_hot((label + 1) % 10, 10).float()
        return gated[:, :, 0, 0] + 0.5 * following


@pytest.fixture
def known(digits: Splits):
    images = digits.test.subset(slice(0, 200))
    pixels = np.zeros((2000, 8, 8, 1), np.uint8)
    pixels[images.ids, 0, 0, 0] = images.labels
    return OneFilterForEachClass(), replace(images, read=lambda ids: pixels[ids])


def test_closing_the_filter_of_a_class_costs_that_class_alone(known):
    network, images = known
    (closing,) = close_combinations(network, images, [Combination((3,), 3)])
    assert (closing.own, closing.others) == (1.0, 0.0)
    assert closing.ratio == float("inf")


def test_closing_the_filters_of_others_is_told_as_theirs(known):
    network, images = known
    (closing,) = close_combinations(network, images, [Combination((4, 5, 6), 3)])
    assert closing.own == 0.0
    assert closing.others == pytest.approx(3 / 9)


def test_classes_without_images_are_no_part_of_what_closing_costs(known):
    network, images = known
    seen = images.subset(np.flatnonzero(images.labels < 5))

    own, absent = close_combinations(network, seen, [Combination((4,), 3), Combination((4,), 7)])

    assert (own.own, own.others) == (0.0, 1 / 4)
    assert own.ratio == 0.0
    assert (np.isnan(absent.own), absent.others, np.isnan(absent.ratio)) == (True, 1 / 5, True)
    (alone,) = close_combinations(network, images.subset(np.flatnonzero(images.labels == 3)), [Combination((3,), 3)])
    assert (alone.own, np.isnan(alone.others), np.isnan(alone.ratio)) == (1.0, True, True)


def test_nothing_closed_is_the_accuracy_of_each_class(decoupled_bundle, digits):
    network: GatedNet = decoupled_bundle.network()
    images = digits.test
    found = class_accuracies(network, images, None)
    with torch.inference_mode():
        logits = network(torch.from_numpy(images.pixels(slice(0, len(images)))).permute(0, 3, 1, 2).float() / 255)
    right = logits.argmax(dim=1).numpy() == images.labels
    expected = [right[images.labels == label].mean() for label in range(10)]
    np.testing.assert_allclose(found, expected)
