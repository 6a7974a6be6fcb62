import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from detector.paths.evidence_shape import EvidenceShape
from detector.paths.features import features_named
from detector.scoring.choice import choose
from detector.scoring.classifier import FalseAlarmClassifier
from detector.scoring.compiled_score import compile_score
from detector.scoring.evaluation import auroc
from detector.scoring.fitting import BENIGN_SHARE, OVERSHOT_SHARE, fit_classifier
from detector.scoring.overshoot import LEAST, MOST, overshot
from detector.scoring.sample import Sample

LAYERS = {"a": 4, "b": 2}


def sample(logits, gates, ids):
    rows = np.float32(np.concatenate([logits, gates, 2 * np.asarray(gates)], axis=1))
    return Sample(EvidenceShape(2, LAYERS, LAYERS).evidence(rows), np.asarray(ids))


def clean_images(count, seed=0):
    """Class 0 leads by 2 to 6; gates are noise."""
    draws = np.random.default_rng(seed)
    logits = np.zeros((count, 2))
    logits[:, 0] = draws.uniform(2, 6, count)
    return sample(logits, draws.normal(size=(count, 6)), np.arange(count))


def attacked_to(lead, moved, clean, seed=1):
    """Class 1 leads by about `lead`, and the first gates were moved a little, in proportion."""
    draws = np.random.default_rng(seed)
    logits = np.zeros((len(clean), 2))
    logits[:, 1] = lead * draws.uniform(0.8, 1.2, len(clean))
    gates = clean.evidence.gate_logits.copy()
    gates[:, :3] += moved
    return sample(logits, gates, clean.ids)


def test_an_attack_is_carried_on_along_its_own_change():
    clean = clean_images(200)
    stopped = attacked_to(0.2, 0.7, clean)

    found = overshot(clean, stopped)

    lengths = (found.evidence.gate_logits - stopped.evidence.gate_logits)[:, 0] / 0.7
    assert LEAST - 1e-4 < lengths.min() < 2 * LEAST
    assert MOST / 2 < lengths.max() < MOST + 1e-4
    change = stopped.evidence.class_logits - clean.evidence.class_logits
    np.testing.assert_allclose(
        found.evidence.class_logits, stopped.evidence.class_logits + lengths[:, None] * change, atol=1e-3
    )
    np.testing.assert_array_equal(found.evidence.path.bits, found.evidence.gate_logits > 0)
    np.testing.assert_allclose(found.evidence.inputs.means, 2 * found.evidence.gate_logits, atol=1e-5)


def test_each_attacked_image_is_held_against_its_own_clean_image():
    clean = clean_images(20)
    stopped = attacked_to(0.2, 0.7, clean)
    order = np.random.default_rng(3).permutation(20)

    found = overshot(clean.at(np.arange(20) < 12), stopped.at(order))

    assert found.ids.tolist() == [image for image in order.tolist() if image < 12]
    moved = (found.evidence.gate_logits - stopped.evidence.gate_logits[found.ids])[:, 3:]
    np.testing.assert_allclose(moved, 0, atol=1e-6)


def test_without_a_known_clean_image_nothing_is_carried_on():
    clean = clean_images(20)

    assert len(overshot(clean.at(slice(5)), attacked_to(0.2, 0.7, clean).at(slice(10, 20)))) == 0


def score_on(clean, attacks, further):
    columns = features_named("gates+margins", EvidenceShape(2, LAYERS)).fit(np.zeros((1, 8)))
    parts = {name: columns.of(part.evidence) for name, part in attacks.items()}
    beyond = {name: columns.of(overshot(clean, part).evidence) for name, part in attacks.items()} if further else {}
    fitted = fit_classifier("logistic-0.1", columns.of(clean.evidence), parts, 0, beyond)
    score = compile_score(FalseAlarmClassifier.around(fitted, 0.05))
    return lambda seen: score(columns.of(seen.evidence))


def test_a_detector_of_attacks_that_stop_early_then_sees_those_that_run_on():
    clean, fresh = clean_images(400), clean_images(400, 5)
    far = attacked_to(12, 2.5, fresh)
    known = {"cw": attacked_to(0.2, 0.7, clean)}

    without, with_it = score_on(clean, known, False), score_on(clean, known, True)

    assert auroc(without(fresh), without(far)) < 0.2
    assert auroc(with_it(fresh), with_it(far)) > 0.9


def test_clean_and_attacked_images_weigh_alike_whatever_else_is_fitted_on(monkeypatch):
    given = []
    monkeypatch.setattr(
        LogisticRegression, "fit", lambda self, _, labels, sample_weight: given.append((labels, sample_weight)) or self
    )
    clean, attacks = np.zeros((100, 2)), {"cw": np.zeros((10, 2)), "pgd": np.zeros((30, 2))}

    fit_classifier("multinomial-0.01", clean, attacks, 0, {"cw": clean[:20]}, {"noise": clean[:40], "fog": clean[:5]})

    ((labels, weights),) = given
    total = {kind: weights[labels == kind].sum() for kind in np.unique(labels).tolist()}
    assert weights.mean() == pytest.approx(1)
    assert total[-2] + total[-1] + total[0] == pytest.approx(total[1] + total[2] + total[3])
    assert total[-2] == pytest.approx(total[-1])
    assert (total[-2] + total[-1]) / (total[-2] + total[-1] + total[0]) == pytest.approx(BENIGN_SHARE)
    assert total[1] + total[3] == pytest.approx(total[2])
    assert total[3] / total[2] == pytest.approx(OVERSHOT_SHARE)


def test_it_is_chosen_where_it_helps_against_attacks_left_out():
    clean = clean_images(400)
    attacks = {"cw": attacked_to(0.2, 0.7, clean), "pgd-end": attacked_to(12, 2.5, clean, 2)}

    tried = choose(clean, attacks, ["gates", "margins"], ["logistic-0.1"], fewer=False, overshoot=(False, True))

    assert [candidate.overshoot for candidate in tried] == [True, False]
    assert tried[0].worst > tried[1].worst + 0.1
