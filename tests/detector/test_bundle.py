import json

import numpy as np
import pytest
import torch
from sklearn.ensemble import IsolationForest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from detector import bundle as bundles
from detector.bundle import Bundle, DetectorInfo, add_detector, recalibrate, upgrade_bundle
from detector.errors import ArtifactError
from detector.files import write_whole
from detector.interpretation.survey import make_usual_paths
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.paths.encoder import Evidence, encode_set
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import features_named
from detector.scoring.classifier import default_estimator
from detector.scoring.detector import Detector
from detector.scoring.fitting import fit_classifier
from detector.scoring.thresholds import Calibration

PLAIN, EVERYTHING = "bits+gates+margins", "bits+gates+inputs+margins+doubts+path-likelihoods+gate-likelihoods"


def columns_of(network, images, kinds=PLAIN):
    evidence = Evidence.stacked(encode_set(network, images))
    return features_named(kinds, EvidenceShape.of(evidence)).fit(rows_of(evidence)).of(evidence)


@pytest.fixture
def whole(decoupled_bundle, digits):
    """A bundle with all three stages; its detector tells dark digits from light ones."""
    columns = columns_of(decoupled_bundle.network(), digits.fitting)
    classifier = default_estimator().fit(columns, digits.fitting.labels > 4)
    calibration = Calibration(np.linspace(-1, 1, 99))
    return add_detector(decoupled_bundle, DetectorInfo(PLAIN, 0.05, ("none",)), classifier, calibration, {})


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
    columns = columns_of(whole.network(), digits.test.first(5))

    expected = whole.classifier().score_samples(columns)

    np.testing.assert_allclose(Detector(whole).detect(pixels).scores, expected, atol=1e-4)


def test_a_classifier_of_several_attacks_is_served_as_scikit_learn_scores(decoupled_bundle, digits):
    columns = columns_of(decoupled_bundle.network(), digits.fitting)
    attacks = {str(label): columns[digits.fitting.labels == label] for label in range(1, 4)}
    classifier = fit_classifier("multinomial-0.01", columns[digits.fitting.labels == 0], attacks)
    info, calibration = (
        DetectorInfo(PLAIN, 0.05, tuple(attacks), "multinomial-0.01"),
        Calibration(np.linspace(-9, 9, 99)),
    )
    bundle = Bundle(add_detector(decoupled_bundle, info, classifier, calibration, {}).folder)

    found = Detector(bundle).detect(digits.test.pixels(slice(0, 5)))

    shares = classifier.predict_proba(columns_of(bundle.network(), digits.test.first(5)))
    np.testing.assert_allclose(found.scores, np.log(1 - shares[:, 0]) - np.log(shares[:, 0]), atol=1e-3)


def test_what_the_features_learnt_comes_back_with_the_bundle(decoupled_bundle, digits):
    network = decoupled_bundle.network()
    evidence = Evidence.stacked(encode_set(network, digits.fitting))
    features = features_named(EVERYTHING, EvidenceShape.of(evidence)).fit(rows_of(evidence))
    classifier = default_estimator().fit(features.of(evidence), digits.fitting.labels > 4)
    info, calibration = DetectorInfo(EVERYTHING, 0.05, ()), Calibration(np.linspace(-1, 1, 99))

    grown = add_detector(decoupled_bundle, info, classifier, calibration, {}, features.arrays())

    again = Bundle(grown.folder).features(network)
    assert np.array_equal(again.of(evidence), features.of(evidence))
    expected = classifier.decision_function(features.of(evidence)[:3])
    np.testing.assert_allclose(Detector(grown).detect(digits.fitting.pixels(slice(0, 3))).scores, expected, atol=1e-3)
    other = add_detector(grown, DetectorInfo("gates", 0.05, ()), classifier, calibration, {})
    assert not list(other.folder.glob("features-*"))
    assert other.model_digest != grown.model_digest


def test_features_of_another_network_are_refused(decoupled_bundle, digits):
    network = decoupled_bundle.network()
    evidence = Evidence.stacked(encode_set(network, digits.fitting))
    features = features_named("gate-likelihoods", EvidenceShape.of(evidence)).fit(rows_of(evidence))
    classifier = default_estimator().fit(features.of(evidence), digits.fitting.labels > 4)
    info = DetectorInfo("gate-likelihoods", 0.05, ())
    grown = add_detector(decoupled_bundle, info, classifier, Calibration(np.zeros(99)), {}, features.arrays())

    with pytest.raises(ArtifactError, match="expected what gate-likelihoods learnt of a network with 10 classes and 6"):
        grown.features(decouple(build_network("resnet20", 1, 10)))


def file_of(bundle, part):
    return next(bundle.folder.glob(f"{part}-*"))


@pytest.mark.parametrize("part", ["backbone", "network", "classifier", "calibration"])
def test_one_changed_byte_in_any_part_is_refused(whole, part):
    file = file_of(whole, part)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    with pytest.raises(ArtifactError, match=f"expected .*{part}-.* with SHA-256 .* it was altered"):
        Bundle(whole.folder)


def test_one_changed_value_in_the_manifest_is_refused(whole):
    path = whole.folder / "manifest.json"
    path.write_text(path.read_text().replace('"max_false_alarm_rate": 0.05', '"max_false_alarm_rate": 0.95'))

    with pytest.raises(ArtifactError, match="expected .*manifest.json as it was written, got another digest"):
        Bundle(whole.folder)


def test_a_missing_part_is_named(whole):
    file_of(whole, "network").unlink()

    with pytest.raises(ArtifactError, match=r"expected the part network-.*.safetensors in .*, got no such file"):
        Bundle(whole.folder)


def edit(folder, **changes):
    """Change the manifest as somebody would who also knows how to make its digest right."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": bundles._digest_of(manifest)}))


def test_a_newer_schema_is_refused_before_anything_is_read(whole):
    edit(whole.folder, schema=99)

    with pytest.raises(ArtifactError, match="expected a bundle of schema 1 to 3, got schema 99 .* update pathguard"):
        Bundle(whole.folder)


def as_schema_1(folder):
    """The bundle as the first release wrote it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sizes"], manifest["digest"]
    manifest["schema"] = 1
    manifest["detector"]["features"] = "all"  # three kinds, in those days
    content = json.dumps({**manifest, "digest": bundles._digest_of(manifest)}, indent=2, sort_keys=True)
    (folder / "manifest.json").write_text(content)
    return content


def test_a_bundle_of_schema_1_is_read_as_it_is_and_upgraded_in_its_place(whole):
    content = as_schema_1(whole.folder)
    before = Detector(Bundle(whole.folder))

    assert upgrade_bundle(whole.folder) == (1, 3)

    upgraded = Bundle(whole.folder)
    after = Detector(upgraded)
    assert upgraded.manifest == whole.manifest
    assert (after.model_version, after.threshold_version) == (before.model_version, before.threshold_version)
    assert (whole.folder / "manifest.schema-1.json").read_text() == content
    assert upgrade_bundle(whole.folder) == (3, 3)


def test_a_damaged_bundle_of_schema_1_is_not_upgraded(whole):
    content = as_schema_1(whole.folder)
    file_of(whole, "network").write_bytes(b"")

    with pytest.raises(ArtifactError, match=r"expected .*network-.* with SHA-256"):
        upgrade_bundle(whole.folder)
    assert (whole.folder / "manifest.json").read_text() == content


def test_a_disk_that_is_full_leaves_a_bundle_of_schema_1_as_it_is(whole, monkeypatch):
    content = as_schema_1(whole.folder)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "write_whole", full)
    with pytest.raises(ArtifactError, match="got: No space left on device"):
        upgrade_bundle(whole.folder)
    assert (whole.folder / "manifest.json").read_text() == content


def test_what_a_killed_run_left_half_written_is_removed_with_the_next_stage(decoupled_bundle, digits):
    half = decoupled_bundle.folder / "classifier-12345678.skops.partial"
    half.write_bytes(b"half")

    make_usual_paths(decoupled_bundle, digits)

    assert not half.exists()


def test_a_part_of_another_size_is_refused_before_it_is_read(whole):
    with file_of(whole, "network").open("ab") as opened:
        opened.truncate(10_000_000)

    with pytest.raises(ArtifactError, match=r"expected .*network-.* of \d+ bytes, got 10000000: it was altered"):
        Bundle(whole.folder)


def test_a_new_calibration_is_another_threshold_version_of_the_same_model(whole, digits):
    before = Detector(whole)
    recalibrated = recalibrate(whole, Calibration(np.linspace(-2, 2, 49)), 0.1, {})

    after = Detector(recalibrated)

    assert after.model_version == before.model_version
    assert after.threshold_version != before.threshold_version
    assert (after.max_false_alarm_rate, after.calibration_images) == (0.1, 49)
    with pytest.raises(ArtifactError, match="expected a false-alarm rate from 0.020000"):
        recalibrate(recalibrated, Calibration(np.linspace(-2, 2, 49)), 0.001, {})


def test_what_another_command_made_of_the_bundle_meanwhile_is_not_undone(whole):
    read_before = Bundle(whole.folder)
    recalibrated = recalibrate(whole, Calibration(np.linspace(-2, 2, 49)), 0.1, {})

    with pytest.raises(ArtifactError, match="expected .* as it was read, got it changed since"):
        recalibrate(read_before, Calibration(np.linspace(-9, 9, 99)), 0.05, {})

    assert Bundle(whole.folder).digest == recalibrated.digest


@pytest.mark.parametrize("parts", [{}, {"../elsewhere": "0" * 64}, []])
def test_parts_that_are_not_those_of_the_stages_are_refused(whole, parts):
    edit(whole.folder, parts=parts)

    with pytest.raises(ArtifactError, match="expected the parts .*'backbone', 'calibration', 'classifier', 'network'"):
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

    with pytest.raises(ArtifactError, match="expected weights of resnet14 in network"):
        Bundle(decoupled_bundle.folder).network()


def test_a_classifier_that_could_not_be_loaded_again_is_not_written(decoupled_bundle):
    rows = np.random.default_rng(0).normal(size=(20, 3))
    risky = make_pipeline(FunctionTransformer(np.loadtxt), IsolationForest())
    risky.steps[1][1].fit(rows)

    with pytest.raises(ArtifactError, match="expected a classifier of trusted scikit-learn types"):
        add_detector(decoupled_bundle, DetectorInfo(PLAIN, 0.05, ()), risky, Calibration(np.zeros(99)), {})
    assert not list(decoupled_bundle.folder.glob("classifier*"))


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_disk_that_fills_up_while_a_stage_is_made_anew_leaves_the_old_one_whole(whole, digits, monkeypatch, writes):
    columns = columns_of(whole.network(), digits.fitting)
    other = default_estimator().fit(columns, digits.fitting.labels > 2)
    done = []

    def filling_up(path, content):
        if len(done) == writes:
            raise OSError(28, "No space left on device")
        done.append(path)
        return write_whole(path, content)

    monkeypatch.setattr(bundles, "write_whole", filling_up)
    with pytest.raises(ArtifactError, match="got: No space left on device"):
        add_detector(whole, DetectorInfo(PLAIN, 0.05, ()), other, Calibration(np.linspace(-2, 2, 99)), {})

    assert Bundle(whole.folder).manifest == whole.manifest
    assert np.array_equal(Bundle(whole.folder).calibration().scores, whole.calibration().scores)


def test_a_stage_that_is_made_anew_leaves_no_old_parts_behind(whole, digits):
    columns = columns_of(whole.network(), digits.fitting)
    other = default_estimator().fit(columns, digits.fitting.labels > 2)

    add_detector(whole, DetectorInfo(PLAIN, 0.05, ()), other, Calibration(np.linspace(-2, 2, 99)), {})

    assert sorted(path.name.split("-")[0] for path in whole.folder.iterdir()) == [
        "backbone", "calibration", "classifier", "manifest.json", "network",
    ]  # fmt: skip


def test_the_loaded_classifier_is_a_scikit_learn_one_with_the_conformal_threshold(whole, digits):
    columns = columns_of(whole.network(), digits.test)

    classifier = whole.classifier()

    p_values = whole.calibration().p_values(classifier.score_samples(columns))
    assert np.array_equal(classifier.predict(columns), p_values <= 0.05)


def test_wrong_pixels_are_refused_before_the_network_sees_them(whole):
    from detector.errors import ImageError

    with pytest.raises(ImageError, match="expected uint8 pixels of shape"):
        Detector(whole).detect(np.zeros((1, 8, 8, 3), np.uint8))
