import math
from dataclasses import replace

import numpy as np
import pytest

from detector.errors import DataError
from detector.interpretation.atlas import class_agreement, make_atlas, purest_of_each_class
from detector.interpretation.atlas_page import write_atlas
from detector.interpretation.census import Census
from detector.interpretation.concepts import Combination, Purity
from detector.paths.path_encoding import PathEncoding


def purity(label: int, value: float, images: int = 5) -> Purity:
    return Purity(Combination((1, 2), label), images, 0.5, value, 0.2, 0.1)


def test_classes_agree_as_often_as_two_random_images_have_a_filter_alike():
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 3, 900)
    bits = draws.random((900, 6)) < np.array([[0.1, 0.9, 0.5, 0.2, 1.0, 0.0]] * 3)[labels]
    census = Census({"a": 4, "b": 2}, 3)
    census.add(PathEncoding(bits, {"a": 4, "b": 2}), labels)
    agreement = class_agreement(census)
    first, second = bits[labels == 0][:, :4], bits[labels == 1][:, :4]
    alike = np.mean([[(one == other).mean() for other in second] for one in first])
    assert agreement["a"][0, 1] == pytest.approx(alike)
    np.testing.assert_allclose(agreement["b"], 1.0)


def test_the_purest_combination_of_each_class_is_chosen():
    found = purest_of_each_class([purity(1, 0.5), purity(0, 0.3), purity(1, 0.8), purity(2, math.nan, images=0)])
    assert [(one.combination.label, one.purity) for one in found] == [(0, 0.3), (1, 0.8)]


def test_an_atlas_tells_of_images_that_nothing_was_fitted_on(decoupled_bundle, digits):
    pixels = digits.fitting.pixels(slice(0, 20))
    atlas = make_atlas(decoupled_bundle, digits, {"noise": (pixels, digits.fitting.labels[:20])})
    assert len(atlas.census) == atlas.judged_images == len(digits.fitting)
    assert len(atlas.layers) == len(atlas.agreement) == 6
    assert sum(point.recipe == "noise" for point in atlas.points) == 20
    assert sum(point.recipe is None for point in atlas.points) == len(digits.fitting)
    for concept in atlas.concepts:
        assert len(concept.regions) == len(concept.pixels)


def test_an_atlas_of_few_images_says_how_many_and_draws_nothing_for_classes_without_any(
    decoupled_bundle, digits, tmp_path
):
    few = digits.fitting.subset(np.flatnonzero(digits.fitting.labels != 2))
    atlas = make_atlas(decoupled_bundle, replace(digits, fitting=few), {})

    write_atlas(tmp_path / "index.html", atlas)

    page = (tmp_path / "index.html").read_text()
    assert f"closed for {len(few)} images" in page
    assert "nan" not in page.split("<main")[-1].split("base64")[0]
    for values in atlas.agreement.values():
        assert np.isnan(values[2]).all()
        assert np.isnan(values[:, 2]).all()
        assert np.isfinite(np.delete(np.delete(values, 2, 0), 2, 1)).all()


def test_a_folder_that_cannot_be_written_is_told(decoupled_bundle, digits, tmp_path):
    atlas = make_atlas(decoupled_bundle, digits, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="expected to write"):
        write_atlas(tmp_path / "file" / "index.html", atlas)
