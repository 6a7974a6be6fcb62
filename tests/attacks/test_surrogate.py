import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from attacks.surrogate import TORCH_FEATURES, Versions, imitate, surrogate_of, torch_features
from detector.errors import RequestError
from detector.network.decouple import decouple
from detector.network.gates import inputs_of, logits_of
from detector.network.networks import build_network
from detector.paths.encoder import encode
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import FEATURES, PathFeatures, features_named
from detector.scoring.classifier import FalseAlarmClassifier, log_odds
from detector.scoring.dropout_network import DropoutNetwork


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(600, 12)).astype(np.float32)


def images_of(rows):
    """Each row of an image of its own."""
    return Versions(rows, np.arange(len(rows)))


def fitted(estimator, rows):
    return FalseAlarmClassifier(estimator).fit(rows, rows[:, 0] + rows[:, 1] * rows[:, 2] > 0.3)


def test_every_kind_of_features_has_a_differentiable_twin():
    assert list(TORCH_FEATURES) == list(FEATURES)


@pytest.mark.parametrize("name", list(FEATURES))
def test_the_twin_is_equal_and_has_a_gradient(name):
    network = decouple(build_network("resnet8", 1, 10)).eval()
    images = torch.rand(5, 1, 12, 12, requires_grad=True)

    logits, readings = network.trace(images)
    usual = encode(network, torch.rand(200, 1, 12, 12))
    features = features_named(name, EvidenceShape.of(usual)).fit(rows_of(usual))
    rows = torch_features(features)(logits, logits_of(readings), inputs_of(readings))

    expected = features.of(encode(network, images.detach()))
    assert np.allclose(rows.detach().numpy(), expected, rtol=1e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad(rows.sum(), images)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()


def test_a_path_bit_far_from_its_jump_still_has_a_gradient():
    gates = torch.tensor([[-8.0, 8.0]], requires_grad=True)

    bits = TORCH_FEATURES["bits"](torch.zeros(1, 2), gates, torch.zeros(1, 0), {}, {"gate": 2})

    assert bits.tolist() == [[0.0, 1.0]]
    assert (torch.autograd.grad(bits.sum(), gates)[0] > 0).all()


def test_features_without_a_twin_are_refused():
    with pytest.raises(RequestError, match="expected features of bits, gates, inputs, margins, .*; got 'smell'"):
        torch_features(PathFeatures(["smell"], EvidenceShape(10, {})))


@pytest.mark.parametrize(
    "estimator",
    [
        None,
        LogisticRegression(),
        make_pipeline(StandardScaler(with_mean=False), LogisticRegression()),
        make_pipeline(StandardScaler(), StandardScaler(with_std=False), LogisticRegression()),
    ],
)
def test_a_logistic_regression_is_translated_exactly(rows, estimator):
    classifier = fitted(estimator, rows * 3 + 5)

    surrogate = surrogate_of(classifier, lambda: images_of(rows))

    assert surrogate.exact
    assert surrogate.spearman == 1.0
    points = torch.from_numpy(rows).requires_grad_(True)
    scores = surrogate.score(points)
    assert np.allclose(scores.detach().numpy(), classifier.score_samples(rows.astype(np.float64)), rtol=1e-9)
    assert (torch.autograd.grad(scores.sum(), points)[0] != 0).any()


@pytest.mark.parametrize("scaler", [StandardScaler(), StandardScaler(with_std=False)])
@pytest.mark.parametrize("model", [LogisticRegression(), DropoutNetwork(8, random_state=0)])
def test_the_sums_of_several_attacks_are_translated_exactly(rows, scaler, model):
    kinds = np.arange(len(rows)) % 4
    pipeline = make_pipeline(scaler, model).fit(rows + kinds[:, None] * np.eye(rows.shape[1])[kinds], kinds)
    classifier = FalseAlarmClassifier.around(pipeline, 0.05)

    surrogate = surrogate_of(classifier, lambda: images_of(rows))

    assert surrogate.exact
    points = torch.from_numpy(rows).requires_grad_(True)
    scores = surrogate.score(points)
    end = np.inf if hasattr(model, "decision_function") else log_odds(1.0)  # of what scikit-learn gives as shares
    expected = classifier.score_samples(rows.astype(np.float64))
    assert np.allclose(scores.detach().numpy().clip(-end, end), expected.clip(-end, end), rtol=1e-6, atol=1e-6)
    assert (torch.autograd.grad(scores.sum(), points)[0] != 0).any()


def test_a_forest_is_imitated_and_the_imitation_is_judged_on_rows_it_did_not_see(rows):
    classifier = fitted(RandomForestClassifier(50, random_state=0), rows)

    surrogate = surrogate_of(classifier, lambda: images_of(rows), seed=3)

    assert not surrogate.exact
    assert surrogate.held_out == 120
    assert surrogate.spearman > 0.7
    points = torch.from_numpy(rows[:5]).requires_grad_(True)
    assert (torch.autograd.grad(surrogate.score(points).sum(), points)[0] != 0).any()
    again = surrogate_of(classifier, lambda: images_of(rows), seed=3)
    assert torch.equal(again.score(points.detach()), surrogate.score(points.detach()))


def test_what_ranks_at_random_is_said_to(rows):
    noise = np.random.default_rng(1).normal(size=len(rows))

    assert abs(imitate(lambda _: noise, images_of(rows), epochs=5).spearman) < 0.4


def test_imitating_leaves_the_generators_of_others_alone(rows):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    imitate(lambda rows: rows[:, 0], images_of(rows), epochs=2)

    assert torch.equal(torch.rand(3), expected)


def test_an_image_that_was_fitted_on_does_not_vouch_for_its_other_versions():
    drawn = np.random.default_rng(2).normal(size=(100, 13)).repeat(6, axis=0)
    rows, scores = drawn[:, :12].astype(np.float32), drawn[:, 12]

    by_row = imitate(lambda _: scores, images_of(rows)).spearman
    by_image = imitate(lambda _: scores, Versions(rows, np.repeat(np.arange(100), 6))).spearman

    assert by_row > 0.8  # learnt by heart
    assert abs(by_image) < 0.4


@pytest.mark.parametrize(
    ("count", "images", "score", "message"),
    [
        (40, 40, lambda rows: rows[:, 0], "at least 50 rows of at least 5 images to imitate a scorer on, got 40 of 40"),
        (60, 4, lambda rows: rows[:, 0], "at least 50 rows of at least 5 images to imitate a scorer on, got 60 of 4"),
        (60, 60, lambda rows: np.ones(len(rows)), "got the same score for all of them"),
    ],
)
def test_what_cannot_be_imitated_is_refused(rows, count, images, score, message):
    with pytest.raises(RequestError, match=message):
        imitate(score, Versions(rows[:count], np.arange(count) % images))
