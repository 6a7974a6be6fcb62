import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from attacks.evaluation.evaluate import evaluate_bundle
from attacks.evaluation.material import CALIBRATION, CLEAN, SetKey, gather
from attacks.evaluation.paths import SEES, PathDetector
from attacks.evaluation.protocol import PROTOCOLS, Trial, protocol_named
from attacks.evaluation.report import content_of, write_evaluation
from attacks.recipes import RECIPES
from attacks.stages import make_attacks, make_detector
from attacks.store import AttackStore
from detector.baselines.baseline import Observed
from detector.baselines.squeezing import FeatureSqueezing
from detector.errors import ArtifactError, RequestError
from detector.paths.evidence_shape import EvidenceShape
from detector.scoring.fitting import fit_classifier
from detector.scoring.overshoot import overshot
from detector.scoring.sample import Sample
from tests.conftest import untrained_bundle

TINY = replace(
    PROTOCOLS["full"], name="tiny", costly_images=3, matrix=2, corrupted_images=3, severities=(1,), foreign_images=20,
    adaptive=Trial(3, 3, 1, {"adaptive-selective": {}, "adaptive-path": {}}, (8, 32)), bootstrap=10,
    baselines=False, shots=(1,), timed_seconds=0.01,
)  # fmt: skip


@pytest.fixture
def judged(decoupled_bundle, digits, tmp_path):
    few = replace(digits, test=digits.test.first(40), fitting=digits.fitting.first(80))
    recipes = [replace(RECIPES[name], budget=48 / 255) for name in ("fgsm", "pgd")]
    make_attacks(decoupled_bundle, few, recipes, tmp_path / "attacks", None, 0, 50, lambda _: None)
    store = AttackStore(tmp_path / "attacks")
    bundle = make_detector(decoupled_bundle, few, store, "gates+margins", 0.05, 0)
    return bundle, few, store


def test_the_same_seed_gives_the_same_report_of_one_file(judged, tmp_path):
    def tables():
        found = evaluate_bundle(*judged, TINY, seed=3)
        content = content_of(found)
        content["tables"].pop("costs")  # times are measured
        return found, content

    (found, first), (_, second) = tables(), tables()
    page, *files = write_evaluation(found, tmp_path / "report")

    assert json.dumps(first) == json.dumps(second)
    assert {name for name, rows in first["tables"].items() if rows} - {"failed"} == {
        "attacks", "worst_case", "worst_unseen", "unseen", "matrix", "false_alarms", "corruptions", "classes",
        "features", "baselines", "fitting_sets", "shots", "adaptive",
    }  # fmt: skip
    assert "margins+doubts" in {row["detector"] for row in first["tables"]["features"]}
    html = page.read_text()
    assert not re.search(r"(src|href)=\"(?!#|data:)", html)
    assert html.count("data:image/png") == 3
    assert all(file.stat().st_size > 0 for file in files)
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["facts"]["protocol"] == "tiny"
    for row in first["tables"]["adaptive"]:
        assert 0 <= row["robust accuracy"] <= 1
        together = row["attack"] == "any of them"
        assert (row["points added"] is not None) == together
        assert not together or row["robust accuracy"] >= row["detector off"] - 1e-9
        assert ("steps 3, restarts 1" if row["budget / 255"] == 32 else "steps 10, restarts 1") in row["settings"] or (
            together
        )


def test_rows_of_other_detectors_are_taken_over_from_a_former_evaluation(judged):
    few = Trial(4, 2, 1, {"adaptive-orthogonal": {}}, (32,))
    protocol = replace(TINY, baselines=True, costly_baselines=False, adaptive_baselines=few)
    first = content_of(evaluate_bundle(*judged, protocol, seed=3))["tables"]
    told = json.loads(json.dumps(first))
    for table in ("baselines", "unseen", "worst_unseen", "adaptive_baselines"):
        for row in told[table]:
            row["said"] = "formerly"

    second = content_of(evaluate_bundle(*judged, protocol, seed=3, former=told))["tables"]

    for table in ("baselines", "unseen", "worst_unseen", "adaptive_baselines"):
        own = [row for row in second[table] if row["detector"].startswith("paths")]
        others = [row for row in second[table] if not row["detector"].startswith("paths")]
        assert own
        assert len(others) > len(own)
        assert all(row.pop("said", "now") == "formerly" for row in others)
        assert second[table] == first[table]
    assert second["attacks"] == first["attacks"]


def test_digits_are_not_foreign_to_a_network_of_digits(judged, digits):
    bundle, few, store = judged
    network = bundle.network()

    def foreign(images):
        found = gather(network, few, store, [PathDetector(network, "bits", "logistic-1", 10)], TINY, 0, images)
        return [key.name for key in found.right if key.split == "foreign"]

    assert foreign(None) == []
    assert foreign(replace(digits.test, name="strangers")) == ["strangers"]


def test_our_detector_is_fitted_anew_on_the_further_images_that_the_bundles_was():
    draws, layers = np.random.default_rng(0), {"a": 3}
    usual, change = np.float32(draws.normal(size=(2, 60, 5)))
    clean, attacked = Observed(usual, np.arange(60)), Observed(usual + 0.3 * change, np.arange(60))

    def sample(seen):
        return Sample(EvidenceShape(2, layers).evidence(seen.rows), seen.ids)

    def scores(overshoot, benign):
        network = SimpleNamespace(layers=layers, reads={})
        ours = PathDetector(network, "gates", "logistic-1", 2, overshoot=overshoot, benign=benign)
        return ours.fit(clean, {"cw": attacked})(change)

    noise = Observed(usual - 0.3 * change, np.arange(60))
    beyond = {"cw": overshot(sample(clean), sample(attacked)).evidence.gate_logits}
    attack, passing = {"cw": attacked.rows[:, 2:]}, {"noise": noise.rows[:, 2:]}
    by_hand = fit_classifier("logistic-1", usual[:, 2:], attack, 0, beyond, passing)
    expected = by_hand.decision_function(change[:, 2:])
    np.testing.assert_allclose(scores(True, {"noise": sample(noise)}), expected, atol=1e-6)
    for other in (scores(False, {"noise": sample(noise)}), scores(True, {})):
        assert not np.allclose(other, expected)


def test_attacks_that_were_not_fitted_on_leave_no_picture_of_the_matrix(judged, tmp_path):
    found = evaluate_bundle(*judged, replace(TINY, matrix=0), adaptive=False)

    files = write_evaluation(found, tmp_path / "report")

    assert "roc.png" in {file.name for file in files}
    assert "matrix.png" not in {file.name for file in files}


def test_other_detectors_are_not_calibrated_for_nothing(judged):
    bundle, few, store = judged
    network = bundle.network()
    methods = [PathDetector(network, "bits", "logistic-1", 10), FeatureSqueezing(network)]

    found = gather(network, few, store, methods, TINY, 0)

    key = SetKey(CALIBRATION, CLEAN)
    assert found.of(SEES, key) is not None
    assert found.of(FeatureSqueezing.sees, key) is None


def test_all_other_detectors_stand_beside_ours(judged):
    content = content_of(evaluate_bundle(*judged, replace(TINY, baselines=True), adaptive=False))

    names = [row["detector"] for row in content["tables"]["baselines"]]
    assert names[0] == "paths"
    assert names[9:] == ["paths, 3 images of a kind"]
    counts = {row["detector"]: row["images fitted on"] for row in content["tables"]["baselines"]}
    assert counts["CDRP"] == counts["paths, 3 images of a kind"] <= 9 < counts["paths"]
    worst = {row["detector"]: row["images fitted on"] for row in content["tables"]["worst_unseen"]}
    assert worst == counts
    assert "adaptive" not in content["tables"]


def test_attacks_on_another_network_are_not_judged_by(judged, digits, tmp_path):
    _, few, store = judged
    other = untrained_bundle(digits)(tmp_path / "other")

    with pytest.raises(ArtifactError, match="expected attacks on the network"):
        evaluate_bundle(other, few, store, TINY)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(
        RequestError, match="expected a protocol of quick, full, larger, hardened, insistent; got 'endless'"
    ):
        protocol_named("endless")
