import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks.campaign import run_attacks
from attacks.recipes import RECIPES
from attacks.report import attack_figures
from attacks.selection import rightly_classified
from attacks.stages import auroc_by_features, make_attacks, make_detector
from attacks.store import AttackStore, Origin, ShardKey
from detector.bundle import Bundle
from detector.errors import ArtifactError, DataError, RequestError
from detector.paths.features import ALL, FEATURES
from tests.conftest import digit_splits, in_a_process_of_its_own, untrained_bundle

RECIPE = [RECIPES["fgsm"]]


def ignore(_campaign):
    return None


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def attacked(decoupled_bundle, digits, tmp_path):
    make_attacks(decoupled_bundle, digits, RECIPE, tmp_path / "attacks", None, 0, 16, ignore)
    return AttackStore(tmp_path / "attacks")


def test_only_images_that_the_network_gets_right_are_attacked(decoupled_bundle, digits, attacked):
    network = decoupled_bundle.network()
    right = digits.test.subset(rightly_classified(network, digits.test))

    shards = list(attacked.read("test", "fgsm"))

    assert np.concatenate([shard.ids for shard in shards]).tolist() == right.ids.tolist()
    assert np.concatenate([shard.labels for shard in shards]).tolist() == right.labels.tolist()
    pixels = torch.from_numpy(right.pixels(slice(None))).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        assert (network(pixels).argmax(dim=1).numpy() == right.labels).all()


def test_an_interrupted_run_repeats_nothing_and_ends_with_the_same_files(decoupled_bundle, digits, tmp_path):
    def stop_after_two(campaign):
        if campaign.done == 2:
            raise KeyboardInterrupt

    def run(folder, listen):
        make_attacks(decoupled_bundle, digits, RECIPE, folder, None, 0, 4, listen)

    run(tmp_path / "whole", ignore)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_after_two)
    crafted = []
    run(tmp_path / "parts", lambda campaign: crafted.append(campaign.record and campaign.record.key))

    whole, parts = (AttackStore(tmp_path / name).records() for name in ("whole", "parts"))
    assert whole == parts
    assert crafted[0] is None
    assert len(crafted) == 1 + len(whole) - 2
    assert not set(list(whole)[:2]) & set(crafted)


def attack_until_killed(bundle, folder, name):
    """Attack, and be killed while the third shard is written: no handler, no clean-up."""
    owner = os if name == "replace" else AttackStore
    usual = getattr(owner, name)

    def killed_in_the_third_shard(*given):
        if "index=2" in repr(given) or "00002-" in repr(given):
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(*given)

    setattr(owner, name, killed_in_the_third_shard)
    make_attacks(Bundle(Path(bundle)), digit_splits(), RECIPE, Path(folder), None, 0, 4, ignore)


@pytest.mark.parametrize("name", ["write", "replace", "note"])
def test_a_run_killed_in_the_middle_of_a_shard_goes_on_to_the_same_files(decoupled_bundle, digits, tmp_path, name):
    def run(folder):
        make_attacks(decoupled_bundle, digits, RECIPE, folder, None, 0, 4, ignore)

    ended = in_a_process_of_its_own(attack_until_killed, decoupled_bundle.folder, tmp_path / "killed", name)
    finished = AttackStore(tmp_path / "killed").records()
    run(tmp_path / "killed")
    run(tmp_path / "whole")

    assert ended == -signal.SIGKILL
    assert len(finished) == 2
    assert AttackStore(tmp_path / "killed").records() == AttackStore(tmp_path / "whole").records()
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_larger_limit_goes_on_where_a_smaller_one_ended(decoupled_bundle, digits, tmp_path):
    for limit in (20, 60):
        make_attacks(decoupled_bundle, digits, RECIPE, tmp_path / "grown", limit, 0, 4, ignore)
    make_attacks(decoupled_bundle, digits, RECIPE, tmp_path / "whole", 60, 0, 4, ignore)

    grown, whole = (AttackStore(tmp_path / name).records() for name in ("grown", "whole"))
    assert grown == whole


def test_report_counts_what_the_shards_hold(attacked):
    (row,) = attack_figures(attacked, "test")

    shards = list(attacked.read("test", "fgsm"))
    fooled = np.concatenate([shard.crafted.fooled for shard in shards])
    assert (row.images, row.fooled) == (len(fooled), fooled.mean())
    assert 0 < row.linf <= 8.5 / 255


def test_a_detector_is_fitted_and_judged(decoupled_bundle, digits, attacked):
    bundle = make_detector(decoupled_bundle, digits, attacked, "all", 0.05, 0)

    by_features = auroc_by_features(bundle, digits, attacked, attacked, 0)

    assert list(by_features) == [*FEATURES, ALL]
    assert all(list(of_attacks) == ["fgsm"] and 0 <= of_attacks["fgsm"] <= 1 for of_attacks in by_features.values())
    assert bundle.manifest.detector.recipes == ("fgsm",)
    assert bundle.manifest.training["detector"]["clean_images"] == len(digits.fitting)


def test_features_and_classifier_are_chosen_by_attacks_left_out(decoupled_bundle, digits, tmp_path):
    recipes = [replace(RECIPES[name], budget=48 / 255) for name in ("fgsm", "pgd")]
    make_attacks(decoupled_bundle, digits, recipes, tmp_path / "attacks", 60, 0, 60, ignore)
    tried = []

    bundle = make_detector(
        decoupled_bundle, digits, AttackStore(tmp_path / "attacks"), "auto", 0.3, 0, "logistic-0.01", "all", True,
        tried.append,
    )  # fmt: skip

    best = max(tried, key=lambda candidate: candidate.merit)
    info, made = bundle.detector_info(), bundle.manifest.training["detector"]
    assert len(tried) > len(FEATURES)
    assert (info.features, info.classifier) == (best.features, "logistic-0.01")
    assert made["candidates"][0]["features"] == best.features
    assert best.features in (bundle.folder / "MODEL_CARD.md").read_text()
    assert bundle.calibration().labels is not None


def test_attacks_are_carried_on_where_that_is_asked_for_and_the_bundle_says_so(decoupled_bundle, digits, tmp_path):
    recipes = [replace(RECIPES[name], budget=48 / 255) for name in ("fgsm", "pgd")]
    make_attacks(decoupled_bundle, digits, recipes, tmp_path / "attacks", 60, 0, 60, ignore)
    store, tried = AttackStore(tmp_path / "attacks"), []

    first = make_detector(decoupled_bundle, digits, store, "gates", 0.3, 0)
    plain = first.classifier()
    further = make_detector(first, digits, store, "gates", 0.3, 0, overshoot=True)
    chosen = make_detector(further, digits, store, "gates", 0.3, 0, listen=tried.append, overshoot=None)

    assert further.detector_info().overshoot
    rows = np.random.default_rng(0).normal(size=(50, plain.n_features_in_))
    assert not np.allclose(further.classifier().score_samples(rows), plain.score_samples(rows))
    best = max(tried, key=lambda candidate: candidate.merit)
    assert sorted(candidate.overshoot for candidate in tried) == [False, True]
    assert Bundle(chosen.folder).detector_info().overshoot == best.overshoot


def test_a_detector_may_be_fitted_to_let_noise_and_corruptions_pass_and_its_bundle_says_so(
    decoupled_bundle, digits, attacked, tmp_path
):
    bundle = make_detector(
        decoupled_bundle, digits, AttackStore(tmp_path / "attacks"), "gates", 0.3, 0, "multinomial-0.01", benign=True
    )

    kinds = bundle.manifest.training["detector"]["benign_images"]
    assert Bundle(bundle.folder).detector_info().benign
    assert "noise" in kinds
    assert len(kinds) > 10
    assert "with noise and corruptions as what is to pass" in (bundle.folder / "MODEL_CARD.md").read_text()
    classes = bundle.classifier().estimator_.classes_.tolist()
    assert classes == list(range(-len(kinds), 1 + len(bundle.detector_info().recipes)))


def test_attacks_with_other_parameters_are_not_mixed(decoupled_bundle, digits, attacked):
    stronger = [replace(RECIPES["fgsm"], budget=16 / 255)]

    for kind in ("bim", "pgd"):  # the same settings, and another attack
        assert replace(RECIPES[kind], name="mine").parameters["kind"] == kind
    with pytest.raises(ArtifactError, match="expected attacks by fgsm with .* give another folder"):
        make_attacks(decoupled_bundle, digits, stronger, attacked.folder, None, 0, 16, ignore)


def test_an_interrupted_attack_is_neither_fitted_nor_judged(decoupled_bundle, digits, tmp_path):
    def stop(campaign):
        if campaign.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_attacks(decoupled_bundle, digits, RECIPE, tmp_path / "parts", None, 0, 4, stop)

    with pytest.raises(DataError, match="run `pathguard attack` again to finish"):
        make_detector(decoupled_bundle, digits, AttackStore(tmp_path / "parts"), "all", 0.05, 0)


def test_attacks_on_another_network_are_refused(digits, attacked, tmp_path):
    torch.manual_seed(99)
    other = untrained_bundle(digits)(tmp_path / "other")

    with pytest.raises(ArtifactError, match="expected attacks on the network"):
        make_detector(other, digits, attacked, "all", 0.05, 0)
    with pytest.raises(ArtifactError, match="expected attacks of network"):
        make_attacks(other, digits, RECIPE, attacked.folder, None, 0, 16, ignore)


def test_a_rate_that_the_calibration_images_do_not_allow_is_refused(decoupled_bundle, digits, attacked):
    with pytest.raises(RequestError, match="expected a false-alarm rate from 0.008333"):
        make_detector(decoupled_bundle, digits, attacked, "bits", 0.001, 0)
    assert decoupled_bundle.manifest.detector is None


def test_images_of_other_size_or_classes_are_refused(decoupled_bundle, digits, tmp_path):
    def with_test(**changes):
        return replace(digits, test=replace(digits.test, **changes))

    coloured = with_test(spec=replace(digits.test.spec, channels=3))
    renamed = with_test(class_names=("a", "b"))

    for splits, message in ((coloured, "expected images of 8 x 8 grey"), (renamed, "expected the classes 0, 1, 2")):
        with pytest.raises(DataError, match=message):
            make_attacks(decoupled_bundle, splits, RECIPE, tmp_path / "x", None, 0, 16, ignore)


def test_a_network_that_is_never_right_leaves_nothing_to_attack(decoupled_bundle, digits, tmp_path):
    wrong = digits.test.subset(slice(0, 5))
    network = decoupled_bundle.network()
    predicted = torch.from_numpy(wrong.pixels(slice(None))).permute(0, 3, 1, 2).float() / 255
    labels = (network(predicted).argmax(dim=1).numpy() + 1) % 10
    origin = Origin("a" * 64, "digits", 0, 4)

    with (
        AttackStore.writing(tmp_path, origin) as store,
        pytest.raises(DataError, match="expected images that the network gets right in the split test"),
    ):
        run_attacks(network, {"test": replace(wrong, labels=labels)}, RECIPE, store, ignore)
    assert ShardKey("test", "fgsm", 0) not in AttackStore(tmp_path).records()
