import numpy as np
import pytest
import torch

from attacks.compaction import make_compact
from attacks.hardening import Hardening, harden
from attacks.recipes import RECIPES
from attacks.stages import make_attacks, make_detector
from attacks.store import AttackStore
from detector.batches import to_tensor
from detector.bundle import MANIFEST, Bundle, GatesInfo, add_network
from detector.errors import ArtifactError, RequestError
from detector.network.schedule import Schedule
from detector.scoring.detector import Detector
from tests.detector.engines.networks import settle


@pytest.fixture
def bundle(decoupled_bundle, digits, tmp_path):
    """A bundle with a detector, whose network never opens every third filter of a layer on ordinary images."""
    network = settle(decoupled_bundle.network(), to_tensor(digits.train.pixels(slice(0, 200)), torch.device("cpu")))
    for gate in network.gates():
        gate.normalise.weight.data[::3] = 0.01
        gate.normalise.bias.data[::3] = -1.0
    grown = add_network(decoupled_bundle, decoupled_bundle.folder, GatesInfo(0.7, True, "pathguard"), network, {})
    store = tmp_path / "attacks"
    make_attacks(grown, digits, [RECIPES["fgsm"]], store, 40, 0, 40, lambda _: None)
    return make_detector(grown, digits, AttackStore(store), "bits+margins", 0.05, 0)


def test_a_compacted_bundle_is_smaller_and_answers_the_same(bundle, digits, tmp_path):
    compact, figures = make_compact(bundle, digits, AttackStore(tmp_path / "attacks"), tmp_path / "compact")

    assert figures.never_open >= figures.filters // 3
    assert figures.weights_left < figures.weights
    assert figures.megabytes_left < figures.megabytes
    assert figures.attacked_images > 0
    pixels = digits.test.pixels(slice(0, 50))
    before, after = Detector(bundle, engine="masked"), Detector(Bundle(compact.folder), engine="sliced")
    assert after.engine == "sliced, compacted"
    one, other = before.detect(pixels), after.detect(pixels)
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.paths.bits, other.paths.bits)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
    assert before.model_version == after.model_version


def test_images_that_open_a_cut_filter_are_counted_and_answered_the_same(bundle, digits, tmp_path):
    compact, _ = make_compact(bundle, digits, None, tmp_path / "compact", limit=2)
    pixels = digits.test.pixels(slice(0, 50))

    before, after = Detector(bundle, engine="masked"), Detector(compact, engine="sliced")
    assert after.answered_in_full == 0
    one, other = before.detect(pixels), after.detect(pixels)

    assert after.answered_in_full > 0
    np.testing.assert_array_equal(one.paths.bits, other.paths.bits)
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-4)


def test_a_compacted_bundle_is_for_serving_only(bundle, digits, tmp_path):
    compact, _ = make_compact(bundle, digits, None, tmp_path / "compact", limit=5)

    with pytest.raises(ArtifactError, match="for serving only"):
        compact.backbone()
    with pytest.raises(ArtifactError, match="for serving only"):
        _ = compact.backbone_digest


def test_a_bundle_is_not_compacted_into_itself(bundle, digits):
    before = (bundle.folder / MANIFEST).read_bytes()

    with pytest.raises(RequestError, match="expected another folder"):
        make_compact(bundle, digits, None, bundle.folder, limit=5)
    assert (bundle.folder / MANIFEST).read_bytes() == before


def test_another_bundle_is_not_replaced_by_a_compaction(bundle, digits, tmp_path):
    network = bundle.network()
    network.gates()[0].squeeze.bias.data += 1
    other = add_network(bundle, tmp_path / "other", GatesInfo(0.7, True, "pathguard"), network, {})
    before = {path: path.read_bytes() for path in other.folder.iterdir()}

    with pytest.raises(ArtifactError, match="expected a new folder .* got .*other with another bundle"):
        make_compact(bundle, digits, None, other.folder, limit=5)
    assert {path: path.read_bytes() for path in other.folder.iterdir()} == before


def test_an_earlier_compaction_is_replaced(bundle, digits, tmp_path):
    make_compact(bundle, digits, None, tmp_path / "compact", limit=2)
    compact, figures = make_compact(bundle, digits, None, tmp_path / "compact", limit=20)

    assert compact.manifest.training["compaction"]["never_open"] == figures.never_open
    assert compact.manifest.training["compaction"]["images"] == 40


def test_a_compacted_bundle_is_not_hardened(bundle, digits, tmp_path):
    compact, _ = make_compact(bundle, digits, None, tmp_path / "compact", limit=5)

    with pytest.raises(ArtifactError, match="for serving only"):
        harden(
            compact, digits, Hardening(steps=1), Schedule(epochs=1), tmp_path / "hard", lambda _: pytest.fail("late")
        )


def test_a_bundle_without_a_detector_is_refused(decoupled_bundle, digits, tmp_path):
    with pytest.raises(ArtifactError, match="pathguard fit"):
        make_compact(decoupled_bundle, digits, None, tmp_path / "compact")


def test_attacks_on_another_network_are_refused(bundle, digits, tmp_path):
    network = bundle.network()
    network.gates()[0].squeeze.bias.data += 1
    other = add_network(bundle, tmp_path / "other", GatesInfo(0.7, True, "pathguard"), network, {})
    store = tmp_path / "other_attacks"
    make_attacks(other, digits, [RECIPES["fgsm"]], store, 10, 0, 10, lambda _: None)

    with pytest.raises(ArtifactError, match="expected attacks on the network"):
        make_compact(bundle, digits, AttackStore(store), tmp_path / "compact", limit=5)
