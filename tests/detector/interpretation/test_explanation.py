import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from detector.batches import to_tensor
from detector.bundle import add_detector
from detector.datasets import Splits
from detector.errors import ArtifactError, ImageError, RequestError
from detector.interpretation.explanation import UNUSUAL_SHARE, Explainer
from detector.interpretation.forced_path import forced_path
from detector.paths.encoder import encode
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import features_named
from detector.scoring.classifier import default_estimator
from detector.scoring.detector import Detector


@pytest.fixture
def images(digits: Splits) -> np.ndarray:
    return digits.test.pixels(slice(0, 6))


def test_an_explanation_agrees_with_the_detector(explained_bundle, images):
    explainer, said = Explainer(explained_bundle), Detector(explained_bundle).detect(images)
    for place, pixels in enumerate(images):
        why = explainer.explain(pixels)
        assert why.label == said.labels[place]
        assert why.score == pytest.approx(said.scores[place], abs=1e-4)
        assert why.p_value == said.p_values[place]
        np.testing.assert_allclose(why.probabilities, said.probabilities[place], atol=1e-5)


def test_base_and_parts_sum_to_the_score(explained_bundle, images):
    for pixels in images:
        why = Explainer(explained_bundle).explain(pixels)
        assert why.base + sum(why.parts.values()) == pytest.approx(why.score, abs=1e-4)
        assert set(why.parts) == {layer.layer for layer in why.layers} | {"margins"}


def test_what_a_gate_reads_counts_for_its_layer_and_for_none_of_its_filters(explained_bundle, digits, images):
    bundle = explained_bundle
    evidence = encode(bundle.network(), to_tensor(digits.fitting.pixels(slice(None)), torch.device("cpu")))
    features = features_named("inputs+margins", EvidenceShape.of(evidence)).fit(rows_of(evidence))
    classifier = default_estimator().fit(features.of(evidence), digits.fitting.labels > 4)
    info = replace(bundle.detector_info(), features="inputs+margins")
    explainer = Explainer(add_detector(bundle, info, classifier, bundle.calibration(), {}))

    for pixels in images:
        why = explainer.explain(pixels)
        assert why.base + sum(why.parts.values()) == pytest.approx(why.score, abs=1e-4)
        assert all(abs(layer.part) > 0 for layer in why.layers)
        assert why.least_usual
        assert [state.part for state in why.least_usual] == [0] * len(why.least_usual)


def test_the_least_usual_filters_are_those_that_fewest_images_of_the_class_have_so(explained_bundle, images):
    explainer = Explainer(explained_bundle)
    for pixels in images:
        why = explainer.explain(pixels)
        layers = why.path.by_layer()
        for state in why.least_usual:
            assert bool(layers[state.layer][0, state.filter]) is state.open
            share = state.usually_open if state.open else 1 - state.usually_open
            assert share < 0.5
            assert state.surprise == pytest.approx(-np.log(share))
        surprises = [state.surprise for state in why.least_usual]
        assert surprises == sorted(surprises, reverse=True)
        all_of_them = explainer.usual.surprise(why.path.bits, np.array([why.label]))[0]
        assert len(surprises) == min(10, int((all_of_them > np.log(2)).sum()))
        assert surprises == pytest.approx(np.sort(all_of_them)[::-1][: len(surprises)].tolist())
        assert sum(layer.unusual for layer in why.layers) == int((all_of_them > -np.log(UNUSUAL_SHARE)).sum())


def test_a_usual_path_has_no_unusual_filters_and_resembles_its_class(explained_bundle, images):
    """Shown the path that most images of a class take, what is compared finds nothing unusual."""
    usual = explained_bundle.usual_paths()
    bits = usual.usual()
    surprise = usual.surprise(bits, np.arange(len(bits)))
    assert (surprise <= np.log(2) + 1e-9).all()


def test_setting_the_least_usual_filters_right_is_forcing_them_to_their_usual_states(explained_bundle, images):
    explainer = Explainer(explained_bundle)
    for pixels in images:
        why = explainer.explain(pixels)
        starts = dict(zip(why.path.layers, np.cumsum([0, *why.path.layers.values()]), strict=False))
        states = why.path.bits.astype(np.float32)
        for state in why.least_usual:
            states[0, starts[state.layer] + state.filter] = not state.open
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode(), forced_path(explainer.network, torch.from_numpy(states)):
            assert int(explainer.network(image).argmax()) == why.label_set_right


def test_the_nearest_path_of_the_label_is_no_nearer_than_the_nearest_of_all(explained_bundle, images):
    why = Explainer(explained_bundle).explain(images[0])
    assert why.nearest is not None
    if why.nearest_of_label is not None:
        assert why.nearest.distance <= why.nearest_of_label.distance
        assert why.nearest_of_label.label == why.label


def test_the_restored_label_is_that_of_the_detector(explained_bundle, images):
    detector, explainer = Detector(explained_bundle), Explainer(explained_bundle)
    said = detector.detect(images)
    restored = detector.restore(images, said.probabilities, said.p_values)
    assert [explainer.explain(pixels).restored for pixels in images] == restored.tolist()


def test_an_explanation_is_json(explained_bundle, images):
    said = json.loads(json.dumps(Explainer(explained_bundle).explain(images[0]).to_json()))
    assert said["label"] in explained_bundle.manifest.network.classes
    assert said["base"] + sum(said["parts"].values()) == pytest.approx(said["score"], abs=1e-4)
    assert len(said["layers"]) == 6


def test_another_rate_is_another_verdict(explained_bundle, images):
    explainer = Explainer(explained_bundle)
    why = explainer.explain(images[0])
    assert explainer.explain(images[0], min(0.99, why.p_value)).flagged
    assert not explainer.explain(images[0], 0.9 * why.p_value).flagged
    with pytest.raises(RequestError, match="expected a false-alarm rate"):
        explainer.explain(images[0], 0.0)


def test_images_of_another_shape_are_refused(explained_bundle):
    with pytest.raises(ImageError, match=r"\(8, 8, 1\)"):
        Explainer(explained_bundle).explain(np.zeros((9, 8, 1), np.uint8))


def test_without_statistics_nothing_is_explained_or_restored(fitted_bundle, images):
    with pytest.raises(ArtifactError, match="pathguard interpret"):
        Explainer(fitted_bundle)
    detector = Detector(fitted_bundle)
    assert not detector.restores
    said = detector.detect(images)
    with pytest.raises(ArtifactError, match="statistics of paths"):
        detector.restore(images, said.probabilities, said.p_values)
