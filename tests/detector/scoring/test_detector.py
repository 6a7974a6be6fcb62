import logging

import numpy as np

from detector.engines.choice import smooth_images
from detector.engines.kernel_score import KernelScore
from detector.images import ImageSpec
from detector.scoring.detector import Detector
from tests.detector.engines.test_engines import needs_kernel


@needs_kernel
def test_beside_an_engine_without_scores_the_compiled_score_is_the_classifiers(fitted_bundle, digits):
    pixels = digits.test.pixels(slice(0, 20))
    detector = Detector(fitted_bundle, engine="masked")

    scores = detector.detect(pixels).scores

    assert detector._kernel_score is not None
    columns = fitted_bundle.features(fitted_bundle.network()).of(detector.choice.answer(pixels).evidence)
    np.testing.assert_allclose(scores, fitted_bundle.classifier().score_samples(columns), atol=1e-6)


@needs_kernel
def test_a_compiled_score_that_is_not_the_classifiers_does_not_serve(fitted_bundle, monkeypatch, caplog):
    right = Detector(fitted_bundle, engine="masked")
    pixels = smooth_images(ImageSpec(8, 8, 1), 5, seed=3)
    expected = right.detect(pixels).scores
    monkeypatch.setattr(KernelScore, "__call__", lambda _self, evidence: np.full(len(evidence), 7.0))

    with caplog.at_level(logging.WARNING):
        found = Detector(fitted_bundle, engine="masked").detect(pixels).scores

    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert "expected the scores of the classifier from the compiled one" in caplog.text
