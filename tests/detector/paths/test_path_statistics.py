import math

import numpy as np
import pytest

from detector.paths.path_encoding import PathEncoding
from detector.paths.path_statistics import class_information, distinct_paths, flipped_bits, layer_figures


def paths(bits, layers):
    return PathEncoding(np.array(bits, np.bool_), layers)


def test_paths_are_counted_once_each():
    assert distinct_paths(paths([[1, 0, 1], [1, 0, 1], [0, 0, 1]], {"a": 3})) == 2


def test_flipped_bits_are_counted_for_each_image():
    before, after = paths([[1, 0, 1], [1, 1, 1]], {"a": 3}), paths([[1, 0, 1], [0, 0, 1]], {"a": 3})

    assert flipped_bits(before, after).tolist() == [0, 2]


def test_bits_that_name_the_class_carry_its_whole_entropy_and_chance_carries_none():
    labels = np.arange(4000) % 4
    telling = np.eye(4, dtype=np.bool_)[labels]
    chance = np.random.default_rng(0).random((4000, 4)) < 0.5

    told = class_information(telling[:2000], labels[:2000], telling[2000:], labels[2000:])
    not_told = class_information(chance[:2000], labels[:2000], chance[2000:], labels[2000:])

    assert told == pytest.approx(math.log(4), abs=0.05)
    assert told <= math.log(4)
    assert not_told == pytest.approx(0.0, abs=0.02)


def test_the_bound_equals_a_joint_distribution_computed_by_hand():
    # Two classes, one bit that is right with probability 3/4: I = ln 2 - H(1/4).
    labels = np.tile([0, 0, 0, 0, 1, 1, 1, 1], 500)
    bits = np.tile([0, 0, 0, 1, 1, 1, 1, 0], 500).astype(np.bool_)[:, None]
    by_hand = math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)

    assert class_information(bits, labels, bits, labels) == pytest.approx(by_hand, abs=1e-3)


def test_layers_are_counted_each_alone_and_in_order():
    labels = np.arange(200) % 2
    always, never = np.ones((200, 1), np.bool_), np.zeros((200, 1), np.bool_)
    changing = (labels == 1)[:, None]
    encoded = PathEncoding.side_by_side({"one": np.hstack([always, changing]), "two": np.hstack([never, never])})

    one, two = layer_figures(encoded, labels, encoded, labels)

    assert (one.layer, one.filters, one.keep_ratio, one.input_dependent) == ("one", 2, 0.75, 0.5)
    assert (one.always_open, one.always_closed) == (0.5, 0.0)
    assert one.information > 0.6
    assert (two.layer, two.keep_ratio, two.always_closed) == ("two", 0.0, 1.0)
    assert two.information == pytest.approx(0.0, abs=1e-3)
