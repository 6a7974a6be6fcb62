import json

import numpy as np
import pytest
import torch
from sklearn.ensemble import IsolationForest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from detector import bundle as bundles
from detector.bundle import Bundle, DetectorInfo, add_detector
from detector.classifier import default_estimator
from detector.encoder import Evidence, encode_set
from detector.errors import ArtifactError
from detector.features import all_features
from detector.scoring import Detector
from detector.thresholds import Calibration


@pytest.fixture
def whole(decoupled_bundle, digits):
    """A bundle with all three stages; its detector tells dark digits from light ones."""
    columns = all_features(Evidence.stacked(encode_set(decoupled_bundle.network(), digits.fitting)))
    classifier = default_estimator().fit(columns, digits.fitting.labels > 4)
    calibration = Calibration(np.linspace(-1, 1, 99))
    return add_detector(decoupled_bundle, DetectorInfo("all", 0.05, ("none",)), classifier, calibration, {})


def test_every_stage_comes_back_as_it_was_written(whole, digits):
    again = Bundle(whole.folder)

    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(again.network()(images), whole.network()(images))
    assert torch.equal(again.backbone()(images), whole.backbone()(images))
    assert np.array_equal(again.calibration().scores, whole.calibration().scores)
    assert again.manifest == whole.manifest
    assert set(again.manifest.training) == {"backbone", "network", "detector"}


def test_a_detector_answers_for_an_image_alone_as_in_a_batch(whole, digits):
    detector = Detector(whole)
    pixels = digits.test.pixels(slice(0, 5))

    together = detector.detect(pixels)
    alone = [detector.detect(image[None]) for image in pixels]

    np.testing.assert_allclose(together.scores, [one.scores[0] for one in alone], atol=1e-3)
    assert together.labels.tolist() == [one.labels[0] for one in alone]
    np.testing.assert_allclose(together.probabilities.sum(axis=1), 1, atol=1e-5)
    assert ((together.p_values > 0) & (together.p_values <= 1)).all()
    assert len(together.paths) == 5


def test_the_score_is_that_of_the_scikit_learn_pipeline(whole, digits):
    pixels = digits.test.pixels(slice(0, 5))
    columns = all_features(Evidence.stacked(encode_set(whole.network(), digits.test.first(5))))

    expected = whole.classifier().decision_function(columns)

    np.testing.assert_allclose(Detector(whole).detect(pixels).scores, expected, atol=1e-4)


@pytest.mark.parametrize(
    "part", ["backbone.safetensors", "network.safetensors", "classifier.skops", "calibration.safetensors"]
)
def test_one_changed_byte_in_any_part_is_refused(whole, part):
    content = bytearray((whole.folder / part).read_bytes())
    content[len(content) // 2] ^= 1
    (whole.folder / part).write_bytes(content)

    with pytest.raises(ArtifactError, match=f"expected .*{part} with SHA-256 .* it was altered"):
        Bundle(whole.folder)


def test_a_missing_part_is_named(whole):
    (whole.folder / "network.safetensors").unlink()

    with pytest.raises(ArtifactError, match=r"expected the part network.safetensors in .*, got no such file"):
        Bundle(whole.folder)


def edit(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_a_newer_schema_is_refused_before_anything_is_read(whole):
    edit(whole.folder, schema=99)

    with pytest.raises(ArtifactError, match="expected a bundle of schema 1, got schema 99 .* update pathguard"):
        Bundle(whole.folder)


def test_a_part_outside_the_folder_is_never_read(whole, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"x")
    edit(whole.folder, parts={"../elsewhere": "0" * 64})

    with pytest.raises(ArtifactError, match="expected the part ../elsewhere"):
        Bundle(whole.folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}'])
def test_a_damaged_manifest_is_refused_in_one_line(whole, content):
    (whole.folder / "manifest.json").write_text(content)

    with pytest.raises(ArtifactError, match="expected a bundle's manifest") as caught:
        Bundle(whole.folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_bundle_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(ArtifactError, match="got no manifest.json; `pathguard train` begins one"):
        Bundle(tmp_path)


def test_a_stage_that_is_not_there_yet_names_the_command_that_adds_it(decoupled_bundle):
    with pytest.raises(ArtifactError, match="run `pathguard fit`"):
        decoupled_bundle.classifier()
    with pytest.raises(ArtifactError, match="run `pathguard fit`"):
        Detector(decoupled_bundle)


def test_weights_that_do_not_fit_the_named_network_are_refused(decoupled_bundle):
    manifest = json.loads((decoupled_bundle.folder / "manifest.json").read_text())
    edit(decoupled_bundle.folder, network={**manifest["network"], "name": "resnet14"})

    with pytest.raises(ArtifactError, match="expected weights of resnet14 in network.safetensors"):
        Bundle(decoupled_bundle.folder).network()


def test_a_classifier_that_could_not_be_loaded_again_is_not_written(decoupled_bundle):
    rows = np.random.default_rng(0).normal(size=(20, 3))
    risky = make_pipeline(FunctionTransformer(np.loadtxt), IsolationForest())
    risky.steps[1][1].fit(rows)

    with pytest.raises(ArtifactError, match="expected a classifier of trusted scikit-learn types"):
        add_detector(decoupled_bundle, DetectorInfo("all", 0.05, ()), risky, Calibration(np.zeros(99)), {})
    assert not (decoupled_bundle.folder / "classifier.skops").exists()


def test_a_full_disk_leaves_the_old_bundle_whole(decoupled_bundle, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "write_whole", full)
    with pytest.raises(ArtifactError, match="got: No space left on device"):
        add_detector(
            decoupled_bundle, DetectorInfo("all", 0.05, ()), default_estimator(), Calibration(np.zeros(99)), {}
        )
    assert Bundle(decoupled_bundle.folder).manifest == decoupled_bundle.manifest


def test_wrong_pixels_are_refused_before_the_network_sees_them(whole):
    from detector.errors import ImageError

    with pytest.raises(ImageError, match="expected uint8 pixels of shape"):
        Detector(whole).detect(np.zeros((1, 8, 8, 3), np.uint8))
