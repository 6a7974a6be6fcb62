import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.errors import PathShapeError
from detector.paths.path_encoding import PathEncoding

widths = st.lists(st.integers(1, 20), min_size=1, max_size=5)


def encoding(widths, images, seed=0):
    chooser = np.random.default_rng(seed)
    return PathEncoding.side_by_side({f"gate{i}": chooser.random((images, w)) < 0.5 for i, w in enumerate(widths)})


@given(widths, st.integers(0, 6))
def test_layers_side_by_side_give_back_all_bits(widths, images):
    path = encoding(widths, images)

    layers = path.by_layer()

    assert {name: bits.shape for name, bits in layers.items()} == {n: (images, w) for n, w in path.layers.items()}
    assert np.array_equal(PathEncoding.side_by_side(layers).bits, path.bits)


@given(widths, st.integers(0, 6))
def test_packed_bits_come_back(widths, images):
    path = encoding(widths, images)

    assert np.array_equal(PathEncoding.unpacked(path.packed(), path.layers).bits, path.bits)


@given(widths, st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_stacked_encodings_keep_their_order(widths, counts):
    parts = [encoding(widths, count, seed) for seed, count in enumerate(counts)]

    assert np.array_equal(PathEncoding.stacked(parts).bits, np.concatenate([part.bits for part in parts]))


@pytest.mark.parametrize("bits", [np.zeros((2, 3)), np.zeros((2, 4), bool), np.zeros(3, bool)])
def test_bits_that_do_not_fit_their_layers_are_refused(bits):
    with pytest.raises(PathShapeError, match=r"expected boolean bits of shape \(images, 3\)"):
        PathEncoding(bits, {"a": 3})


def test_encodings_of_two_networks_are_not_stacked():
    with pytest.raises(PathShapeError, match="of one network"):
        PathEncoding.stacked([encoding([3], 1), encoding([4], 1)])
    with pytest.raises(PathShapeError, match="at least one gated layer"):
        PathEncoding.side_by_side({})
    with pytest.raises(PathShapeError, match="expected 2 bytes for 9 channels"):
        PathEncoding.unpacked(np.zeros((1, 1), np.uint8), {"a": 9})
