from dataclasses import replace

import numpy as np
import pytest

from detector.bundle import Bundle, add_usual_paths
from detector.errors import ArtifactError, DataError
from detector.interpretation.survey import make_usual_paths, survey_paths
from detector.interpretation.usual_paths import UsualPaths, UsualPathsBuilder
from detector.paths.encoder import encode_set
from detector.paths.path_encoding import PathEncoding

LAYERS = {"first": 4, "second": 4}


@pytest.fixture
def usual() -> UsualPaths:
    """Class 0 opens the first layer alone, class 1 the second alone; two images in a hundred do otherwise."""
    labels = np.repeat([0, 1], 100)
    bits = np.zeros((200, 8), bool)
    bits[:100, :4] = True
    bits[100:, 4:] = True
    bits[[0, 1, 100, 101]] ^= True
    builder = UsualPathsBuilder(LAYERS, 2, sample_of_each=10)
    for start in range(0, 200, 30):
        part = slice(start, start + 30)
        builder.add(PathEncoding(bits[part], LAYERS), labels[part], np.arange(200)[part])
    return builder.built()


def test_the_usual_path_of_a_class_is_that_of_most_of_its_images(usual):
    np.testing.assert_array_equal(usual.usual(), [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4])


def test_rare_states_surprise_and_usual_ones_do_not(usual):
    bits = usual.usual()[[0]]
    bits[0, 2] = False
    surprise = usual.surprise(bits, np.array([0]))[0]
    assert surprise.argmax() == 2
    assert surprise[2] == pytest.approx(-np.log(2.5 / 101))
    assert np.delete(surprise, 2).max() < 0.03


def test_a_path_resembles_the_class_that_usually_takes_it(usual):
    assert usual.likelihoods(usual.usual()).argmax(axis=1).tolist() == [0, 1]


def test_log_likelihoods_are_the_surprise_of_all_filters_together(usual):
    bits = np.random.default_rng(0).random((5, 8)) < 0.5
    labels = np.array([0, 1, 0, 1, 0])
    surprise = usual.surprise(bits, labels).sum(axis=1)
    np.testing.assert_allclose(-usual.likelihoods(bits)[np.arange(5), labels], surprise)


def test_the_nearest_path_differs_in_the_fewest_filters(usual):
    bits = usual.usual()[1]
    bits[0] = True
    near = usual.nearest(bits)
    assert near is not None
    assert near.distance == 1
    assert (bits != usual.sample.bits[usual.ids == near.image][0]).sum() == 1


def test_the_nearest_path_of_one_class_is_of_that_class(usual):
    exception = usual.nearest(usual.usual()[1], label=0)
    assert exception is not None
    assert (exception.label, exception.distance) == (0, 0)
    assert exception.image in (0, 1)  # the images of class 0 that do otherwise


def test_a_sample_of_each_class_is_kept(usual):
    assert np.bincount(usual.labels).tolist() == [10, 10]
    assert len(usual.census) == 200


def test_statistics_survive_being_written(usual):
    again = UsualPaths.from_bytes(usual.to_bytes(), LAYERS, 2)
    np.testing.assert_array_equal(again.rates, usual.rates)
    np.testing.assert_array_equal(again.sample.bits, usual.sample.bits)
    np.testing.assert_array_equal(again.ids, usual.ids)


def test_statistics_of_another_network_are_refused(usual):
    with pytest.raises(ArtifactError, match="expected counts"):
        UsualPaths.from_bytes(usual.to_bytes(), {"first": 9}, 2)
    with pytest.raises(ArtifactError, match="damaged"):
        UsualPaths.from_bytes(b"nothing", LAYERS, 2)


def test_a_bundle_without_statistics_says_which_command_makes_them(decoupled_bundle):
    with pytest.raises(ArtifactError, match="pathguard interpret --bundle"):
        decoupled_bundle.usual_paths()


def test_a_bundle_keeps_the_statistics_of_its_training_images(decoupled_bundle, digits):
    grown = make_usual_paths(decoupled_bundle, digits)
    again = Bundle(grown.folder).usual_paths()
    surveyed = survey_paths(decoupled_bundle.network(), digits.train)
    np.testing.assert_array_equal(again.census.opened, surveyed.census.opened)
    made = grown.manifest.training["statistics"]
    assert made["labelled_right"] == len(again.census) > 0


def test_statistics_leave_the_network_what_it_is(decoupled_bundle, digits):
    grown = make_usual_paths(decoupled_bundle, digits)
    assert grown.network_digest == decoupled_bundle.network_digest


def test_altered_statistics_are_refused(decoupled_bundle, digits):
    grown = make_usual_paths(decoupled_bundle, digits)
    (part,) = grown.folder.glob("statistics-*")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(ArtifactError, match="altered"):
        Bundle(grown.folder)


def test_a_network_that_gets_nothing_right_has_no_usual_paths(decoupled_bundle, digits):
    network = decoupled_bundle.network()
    images = digits.train.subset(slice(0, 50))
    wrong = images.labels.copy()
    (evidence,) = encode_set(network, images)
    wrong[:] = (evidence.class_logits.argmax(axis=1) + 1) % 10
    with pytest.raises(DataError, match="none of 50"):
        survey_paths(network, replace(images, labels=wrong))


def test_new_statistics_take_the_place_of_the_old(decoupled_bundle, digits):
    first = make_usual_paths(decoupled_bundle, digits)
    other = UsualPathsBuilder(first.network().layers, 10).built()
    second = add_usual_paths(first, other, {})
    assert len(second.usual_paths().census) == 0
    assert len(list(second.folder.glob("statistics-*"))) == 1
