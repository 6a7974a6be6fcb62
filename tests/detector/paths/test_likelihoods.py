import numpy as np
import pytest

from detector.paths.evidence_shape import EvidenceShape
from detector.paths.features import features_named
from detector.paths.likelihoods import (
    MEASURES,
    gate_likelihoods,
    learn_gate_gaussians,
    learn_open_shares,
    path_likelihoods,
)


def logits_of(labels, classes):
    return np.eye(classes, dtype=np.float32)[labels]


def test_the_likelihood_of_bits_computed_by_hand():
    # Class 0: filter a open 2 of 2, filter b 0 of 2. Class 1: both open 1 of 2. Smoothed by one open and one closed.
    labels = np.array([0, 0, 1, 1])
    gates = np.array([[1, -1], [1, -1], [1, 1], [-1, -1]], np.float32)
    shares = np.array([[3 / 4, 1 / 4], [1 / 2, 1 / 2]])
    layers = {"a": 1, "b": 1}

    learnt = learn_open_shares(logits_of(labels, 2), gates, layers)
    seen = path_likelihoods(logits_of(np.array([0]), 2), np.array([[5.0, 5.0]], np.float32), learnt, layers)

    of_a, of_b = np.log(shares[:, 0]), np.log(shares[:, 1])
    whole = (of_a + of_b) / 2
    expected = [of_a[0], of_a[0] - of_a[1], of_b[0], of_b[0] - of_b[1], whole[0], whole[0] - whole[1]]
    np.testing.assert_allclose(seen[0], expected, rtol=1e-6)


def test_a_class_that_no_clean_image_was_predicted_to_be_of_never_explains_a_path_best():
    chooser = np.random.default_rng(0)
    labels, shares, layers = np.repeat([0, 1], 200), chooser.uniform(0.02, 0.98, (2, 6)), {"a": 2, "b": 4}
    gates = np.where(chooser.random((400, 6)) < shares[labels], 1, -1).astype(np.float32)
    odd = chooser.normal(size=(50, 6)).astype(np.float32)  # any path at all

    known = learn_open_shares(logits_of(labels, 2), gates, layers)
    learnt = learn_open_shares(logits_of(labels, 3), gates, layers)

    first = np.zeros(50, np.int64)
    of_two, of_three = (
        path_likelihoods(logits_of(first, classes), odd, arrays, layers)
        for classes, arrays in ((2, known), (3, learnt))
    )
    np.testing.assert_array_equal(of_three, of_two)
    of_unknown = path_likelihoods(logits_of(first + 2, 3), odd, learnt, layers)
    assert (of_unknown[:, 1::2] <= 1e-6).all()  # its lead


def test_the_likelihood_of_gate_logits_is_the_mahalanobis_distance_to_the_class():
    chooser = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 4000)
    means = np.array([[0, 0], [4, 0], [0, 3]])
    mixing = np.array([[1.0, 0.5], [0.0, 2.0]])
    gates = (means[labels] + chooser.normal(size=(len(labels), 2)) @ mixing).astype(np.float32)
    layers = {"only": 2}

    learnt = learn_gate_gaussians(logits_of(labels, 3), gates, layers)
    points = np.array([[1.0, 1.0], [4.0, 0.0]], np.float32)
    seen = gate_likelihoods(logits_of(np.array([2, 1]), 3), points, learnt, layers)

    inverse = np.linalg.inv(mixing.T @ mixing)
    apart = points[:, None] - means
    likely = -0.5 * np.einsum("icx,xy,icy->ic", apart, inverse, apart) / 2
    np.testing.assert_allclose(seen[0, 0], likely[0, 2], rtol=0.1)
    np.testing.assert_allclose(seen[0, 1], likely[0, 2] - likely[0, :2].max(), rtol=0.1)
    np.testing.assert_allclose(seen[1, 1], likely[1, 1] - likely[1, [0, 2]].max(), rtol=0.1)


@pytest.mark.parametrize("kind", ["path-likelihoods", "gate-likelihoods"])
def test_a_path_of_another_class_than_the_predicted_one_lags_behind(kind):
    chooser = np.random.default_rng(1)
    labels = chooser.integers(3, size=600)
    gates = (np.eye(3)[labels] @ chooser.normal(size=(3, 12)) * 3 + chooser.normal(size=(600, 12))).astype(np.float32)
    features = features_named(kind, EvidenceShape(3, {"a": 4, "b": 8}))
    features.fit(np.concatenate([logits_of(labels, 3), gates], axis=1))

    usual = features.transform(np.concatenate([logits_of(labels, 3), gates], axis=1))
    odd = features.transform(np.concatenate([logits_of((labels + 1) % 3, 3), gates], axis=1))

    lead = [place for place, column in enumerate(features.columns()) if column.measure == MEASURES[1]]
    assert len(lead) == 3
    assert (usual[:, lead[-1]] > 0).mean() > 0.9
    assert (odd[:, lead[-1]] < 0).mean() > 0.9


def test_attacked_images_teach_nothing_about_what_is_usual():
    chooser = np.random.default_rng(2)
    rows = chooser.normal(size=(100, 8)).astype(np.float32)
    attacked = np.arange(100) >= 60

    some = features_named("gate-likelihoods+path-likelihoods", EvidenceShape(3, {"a": 5})).fit(rows, attacked)
    clean = features_named("gate-likelihoods+path-likelihoods", EvidenceShape(3, {"a": 5})).fit(rows[:60])

    assert np.array_equal(some.transform(rows), clean.transform(rows))


def test_a_class_that_was_never_predicted_and_a_filter_that_never_changes_break_nothing():
    chooser = np.random.default_rng(3)
    gates = chooser.normal(size=(50, 4)).astype(np.float32)
    gates[:, 2] = 1.5
    rows = np.concatenate([logits_of(chooser.integers(2, size=50), 3), gates], axis=1)

    seen = features_named("gate-likelihoods+path-likelihoods", EvidenceShape(3, {"a": 4})).fit_transform(rows)

    assert np.isfinite(seen).all()
    assert np.abs(seen).max() < 1e4
