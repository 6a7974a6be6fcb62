import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.errors import PathShapeError, RequestError
from detector.interpretation.census import Census
from detector.paths.path_encoding import PathEncoding

LAYERS = {"first": 3, "second": 2}


def paths(images: int, seed: int = 0) -> tuple[PathEncoding, np.ndarray]:
    draws = np.random.default_rng(seed)
    return PathEncoding(draws.random((images, 5)) < 0.6, LAYERS), draws.integers(0, 3, images)


def census_of(path: PathEncoding, labels: np.ndarray, together: bool = False) -> Census:
    census = Census(LAYERS, 3, together)
    census.add(path, labels)
    return census


@given(st.integers(0, 40), st.integers(0, 40))
def test_counting_in_parts_is_counting_at_once(first, second):
    path, labels = paths(first + second)
    at_once, apart = census_of(path, labels, True), Census(LAYERS, 3, True)
    apart.add(PathEncoding(path.bits[:first], LAYERS), labels[:first])
    apart.add(PathEncoding(path.bits[first:], LAYERS), labels[first:])
    for name in ("images", "opened", "together"):
        np.testing.assert_array_equal(getattr(apart, name), getattr(at_once, name))


def test_rates_are_the_shares_of_open_filters():
    path, labels = paths(200)
    census = census_of(path, labels)
    np.testing.assert_allclose(census.rates(), path.bits.mean(axis=0))
    np.testing.assert_allclose(census.class_rates()[1], path.bits[labels == 1].mean(axis=0))


def test_firing_correlation_is_the_correlation_of_the_bits():
    path, labels = paths(300)
    expected = np.corrcoef(path.bits.T.astype(float))
    np.testing.assert_allclose(census_of(path, labels, True).firing_correlation(), expected, atol=1e-9)


def test_a_constant_filter_is_correlated_with_none():
    path = PathEncoding(np.ones((10, 5), bool), LAYERS)
    assert (census_of(path, np.zeros(10, np.int64), True).firing_correlation() == 0).all()


def test_a_filter_that_is_open_for_one_class_alone_tells_that_class():
    labels = np.repeat([0, 1], 500)
    bits = np.zeros((1000, 5), bool)
    bits[:, 0] = labels == 1
    census = census_of(PathEncoding(bits, LAYERS), labels)
    assert census.information()[0] == pytest.approx(np.log(2))
    assert census.conditional_entropy()[0] == pytest.approx(0)
    assert census.information()[1:].max() == 0


def test_the_stated_bias_is_what_independent_filters_seem_to_know():
    draws = np.random.default_rng(1)
    seen = []
    for _ in range(300):
        census = Census({"all": 4}, 10)
        census.add(PathEncoding(draws.random((400, 4)) < 0.5, {"all": 4}), draws.integers(0, 10, 400))
        seen.append((census.information().mean(), census.bias().mean()))
    found, stated = np.mean(seen, axis=0)
    assert stated == pytest.approx(9 / 800)
    assert found == pytest.approx(stated, rel=0.1)


def test_a_class_without_images_has_no_leaning():
    path, _ = paths(10)
    census = census_of(path, np.zeros(10, np.int64))
    assert (census.class_rates()[2] == 0.5).all()
    assert np.isfinite(census.information()).all()


def test_smoothed_rates_are_never_certain():
    census = census_of(PathEncoding(np.ones((10, 5), bool), LAYERS), np.zeros(10, np.int64))
    assert census.class_rates(1.0)[0, 0] == pytest.approx(11 / 12)


def test_what_was_not_counted_cannot_be_told():
    path, labels = paths(5)
    with pytest.raises(RequestError, match="counts pairs"):
        census_of(path, labels).firing_correlation()
    with pytest.raises(RequestError, match="at least one image"):
        Census(LAYERS, 3).entropy()


def test_paths_of_another_network_are_refused():
    with pytest.raises(PathShapeError, match="5 filters"):
        Census(LAYERS, 3).add(PathEncoding(np.ones((2, 4), bool), {"first": 4}), np.zeros(2, np.int64))
