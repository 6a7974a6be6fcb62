import numpy as np
import pytest

from detector.errors import DataError
from detector.paths.evidence_shape import EvidenceShape
from detector.scoring.choice import _half, choose, family_of
from detector.scoring.sample import Sample


def sample(shift, count, seed, filters=slice(0, 6)):
    """Attacks move the gate logits of some filters; class logits say nothing."""
    chooser = np.random.default_rng(seed)
    gates = chooser.normal(0, 1, (count, 12)).astype(np.float32)
    gates[:, filters] += shift
    logits = chooser.normal(0, 1, (count, 3)).astype(np.float32)
    rows = np.concatenate([logits, gates], axis=1)
    return Sample(EvidenceShape(logits.shape[1], {"a": 8, "b": 4}).evidence(rows), np.arange(count))


ATTACKS = {"pgd": sample(1.5, 120, 1), "pgd-2": sample(1.0, 120, 2), "cw": sample(1.2, 120, 3)}


def test_features_that_say_nothing_are_left_out_and_the_best_comes_first():
    tried = choose(sample(0, 300, 0), ATTACKS, ["gates", "margins"], ["logistic-0.01", "logistic-1"])

    assert tried[0].features == "gates"
    assert tried[0].mean > 0.85
    assert tried[0].worst <= tried[0].mean
    alone = next(candidate for candidate in tried if candidate.features == "margins")
    assert alone.mean < 0.65
    assert [candidate.merit for candidate in tried] == sorted((c.merit for c in tried), reverse=True)


def test_an_attack_left_out_is_judged_by_a_classifier_that_never_saw_it():
    # Two attacks that move other filters: known ones are told apart, each alone says nothing about the other.
    attacks = {"pgd": sample(3, 200, 1, slice(0, 3)), "cw": sample(3, 200, 2, slice(6, 9))}

    (found,) = choose(sample(0, 400, 0), attacks, ["gates"], ["logistic-0.01"])

    assert found.seen > 0.95
    assert 0.3 < found.worst < 0.7


def test_an_image_and_its_attacked_versions_lie_in_the_same_half():
    clean, some = sample(0, 300, 0), sample(1, 300, 1).at(np.arange(300) % 3 == 0)

    for half in (0, 1):
        inside, outside = _half(clean, half, 5), _half(some, 1 - half, 5)
        assert not set(inside.ids) & set(outside.ids)
        assert 0.3 < len(inside.ids) / 300 < 0.7


def test_an_attack_with_a_single_success_is_not_left_out_and_the_choice_goes_on(caplog):
    attacks = {"pgd": ATTACKS["pgd"], "cw": ATTACKS["cw"].at(slice(1)), "fgsm": ATTACKS["cw"].at(slice(0))}

    (found,) = choose(sample(0, 300, 0), attacks, ["gates"], ["logistic-0.01"])

    assert 0 <= found.worst <= found.mean <= 1
    assert "too few attacked images to choose by leaving out fgsm" in caplog.text
    with pytest.raises(DataError, match="expected attacked images in both halves of the fitting split"):
        choose(sample(0, 300, 0), {"cw": attacks["cw"], "fgsm": attacks["fgsm"]}, ["gates"], ["logistic-0.01"])


def test_one_family_alone_leaves_nothing_to_leave_out():
    assert {family_of(name) for name in ("pgd-2", "pgd-end", "bim", "bim-end", "mi-fgsm-2", "mi-fgsm-transfer")} == {
        "pgd"
    }
    assert {family_of(name) for name in ("apgd-ce-2", "apgd-l2", "autoattack-4")} == {"apgd"}
    assert [family_of(name) for name in ("fgsm-1", "cw-targeted", "square")] == ["fgsm", "cw", "square"]
    with pytest.raises(DataError, match="expected at least two families of attacks to leave one out, got pgd"):
        choose(sample(0, 30, 0), {"pgd": ATTACKS["pgd"], "pgd-2": ATTACKS["pgd-2"]}, ["gates"], ["logistic-1"])
