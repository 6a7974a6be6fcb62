import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier

from attacks.adaptive.defence import Defence, defence_of
from attacks.adaptive.suite import ADAPTIVE
from attacks.craft import craft
from attacks.recipes import RECIPES
from attacks.selection import rightly_classified
from attacks.stages import make_attacks, make_detector
from attacks.store import AttackStore
from detector.batches import to_pixels, to_tensor
from detector.bundle import Bundle, add_detector
from detector.errors import ArtifactError, RequestError
from detector.network.training import Schedule
from detector.paths.encoder import encode, encode_set
from detector.scoring.classifier import FalseAlarmClassifier
from detector.scoring.detector import Detector
from detector.scoring.thresholds import Calibration
from detector.stages import make_backbone, make_decoupled

CPU = torch.device("cpu")
WITH_GRADIENTS = pytest.mark.parametrize(
    "recipe", [recipe for recipe in ADAPTIVE if recipe.name not in ("adaptive-square", "adaptive-hopskipjump")],
    ids=lambda recipe: recipe.name,
)  # fmt: skip


@pytest.fixture(scope="module")
def defended(digits, tmp_path_factory):
    """A bundle whose network knows digits, with a detector on all features of their paths."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, schedule = tmp_path_factory.mktemp("defended"), Schedule(4, 64, 0.05, flip=False)
    bundle, _ = make_backbone("resnet8", digits, schedule, folder / "bundle", lambda _: None)
    bundle, _ = make_decoupled(bundle, digits, 0.7, "pathguard", schedule, bundle.folder, lambda _: None)
    recipes = [replace(RECIPES["pgd"], budget=48 / 255), RECIPES["pgd-l2"]]
    make_attacks(bundle, digits, recipes, folder / "attacks", None, 0, 250, lambda _: None, ("fitting",))
    return make_detector(bundle, digits, AttackStore(folder / "attacks"), "all", 0.05, 0)


@pytest.fixture(scope="module")
def network(defended):
    return defended.network()


@pytest.fixture(scope="module")
def defence(defended, network, digits):
    return defence_of(defended, network, digits.validation)


@pytest.fixture(scope="module")
def victims(network, digits):
    """Test images that the network gets right."""
    images = digits.test.subset(rightly_classified(network, digits.test)).first(20)
    return to_tensor(images.pixels(slice(None)), CPU), torch.from_numpy(images.labels)


def test_an_attacker_sees_what_is_served(defended, defence, victims):
    images, _ = victims
    served = Detector(defended).detect(to_pixels(images))

    labels, scores = defence.judge(images)
    seen = defence.see(images)

    assert defence.exact
    assert "imitation" not in defence.known
    assert np.array_equal(labels.numpy(), served.labels)
    assert np.allclose(scores.numpy(), served.scores, atol=1e-3)
    assert np.allclose(seen.scores.detach().numpy(), scores.numpy(), atol=1e-3)
    assert defence.threshold == pytest.approx(defended.calibration().threshold(0.05))


def test_where_each_class_has_its_threshold_an_attacker_sees_the_score_that_is_judged(
    defended, network, digits, victims, tmp_path
):
    shutil.copytree(defended.folder, tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle")
    of_class = np.repeat(np.arange(10), 20)
    calibration = Calibration(np.tile(np.arange(20.0), 10) + 5 * of_class, of_class)
    info = replace(bundle.detector_info(), max_false_alarm_rate=0.2)
    learnt = bundle.features(network).arrays()
    moved = add_detector(bundle, info, bundle.classifier().estimator_, calibration, {}, learnt)
    known = defence_of(moved, network, digits.validation)

    _, scores = known.judge(victims[0])
    seen = known.see(victims[0]).scores.detach()

    assert known.exact
    assert np.allclose(seen.numpy(), scores.numpy(), atol=1e-3)


def test_the_score_has_a_gradient_at_the_pixels(defence, victims):
    images = victims[0].clone().requires_grad_(True)

    (gradient,) = torch.autograd.grad(defence.see(images).scores.sum(), images)

    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()


def test_guides_are_right_and_unflagged_images_of_the_given_set(defence, digits):
    labels, scores = defence.judge(defence.guides.images)
    given = {pixels.tobytes() for pixels in digits.validation.pixels(slice(None))}

    assert len(defence.guides) > 50
    assert torch.equal(labels, defence.guides.labels)
    assert (scores <= defence.threshold).all()
    assert all(pixels.tobytes() in given for pixels in to_pixels(defence.guides.images))
    assert torch.allclose(defence.see(defence.guides.images).gates, defence.guides.gates, atol=1e-4)


def test_another_rate_sets_another_threshold(defended, network, digits, defence):
    stricter = defence_of(defended, network, digits.validation, rate=0.2)

    assert stricter.threshold < defence.threshold
    with pytest.raises(RequestError, match="expected a false-alarm rate"):
        defence_of(defended, network, digits.validation, rate=1e-6)


def test_a_bundle_without_a_detector_is_refused(decoupled_bundle, digits):
    with pytest.raises(ArtifactError, match="expected a detector in"):
        defence_of(decoupled_bundle, decoupled_bundle.network(), digits.validation)


@WITH_GRADIENTS
def test_success_grows_with_the_budget_until_every_image_evades(recipe, network, defence, victims):
    evaded = [
        craft(
            replace(recipe, budget=budget, settings={**recipe.settings, "steps": 30, "restarts": 1}),
            network, *victims, watcher=defence,
        ).reached.mean()
        for budget in (8 / 255, 32 / 255, 1.0)
    ]  # fmt: skip

    assert evaded == sorted(evaded)
    assert evaded[-1] == 1.0


@WITH_GRADIENTS
def test_more_steps_and_more_restarts_never_hurt_any_image(recipe, network, defence, victims):
    def evaded(steps, restarts):
        settings = {**recipe.settings, "steps": steps, "restarts": restarts}
        return craft(
            replace(recipe, budget=32 / 255, settings=settings), network, *victims, watcher=defence
        ).reached  # fmt: skip

    few, more_restarts = evaded(6, 1), evaded(6, 3)

    assert (few <= evaded(12, 1)).all()
    assert (few <= more_restarts).all()


def test_knowing_the_detector_evades_it_more_often_than_not_knowing_it(network, defence, victims):
    images, labels = victims
    plain = craft(replace(RECIPES["pgd"], budget=48 / 255), network, images, labels)
    _, scores = defence.judge(to_tensor(plain.pixels, CPU))
    unaware = (plain.fooled & (scores.numpy() <= defence.threshold)).mean()

    orthogonal = next(recipe for recipe in ADAPTIVE if recipe.name == "adaptive-orthogonal")
    aware = craft(
        replace(orthogonal, budget=48 / 255, settings={"steps": 30, "restarts": 2}), network, images, labels,
        watcher=defence,
    )  # fmt: skip

    assert aware.reached.mean() > unaware + 0.2


def test_a_store_tells_all_settings_of_an_attack_and_of_its_detector_apart(defended, digits, tmp_path):
    shutil.copytree(defended.folder, tmp_path / "bundle")
    bundle, store, log = Bundle(tmp_path / "bundle"), tmp_path / "attacks", tmp_path / "attacks" / "shards.jsonl"
    selective = next(recipe for recipe in ADAPTIVE if recipe.name == "adaptive-selective")
    few = replace(selective, settings={**selective.settings, "steps": 1, "restarts": 1})

    def attack(recipe, limit, bundle=bundle):
        make_attacks(bundle, digits, [recipe], store, limit, 0, 4, lambda _: None, ("test",))
        return [record.parameters for record in AttackStore(store).records().values()]

    (stored,) = attack(few, 4)
    assert stored == {
        **few.parameters, "detector": bundle.threshold_digest, "false_alarm_rate": 0.05,
        "step": 0.25, "momentum": 0.75, "lead": 0.05, "steps": 1, "restarts": 1,
    }  # fmt: skip
    with pytest.raises(ArtifactError, match="'momentum': 0.5.* give another folder"):
        attack(replace(few, settings={**few.settings, "momentum": 0.5}), 8)
    laxer = replace(bundle.detector_info(), max_false_alarm_rate=0.2)
    learnt, calibration = bundle.features(bundle.network()).arrays(), bundle.calibration()
    other = add_detector(bundle, laxer, bundle.classifier().estimator_, calibration, {}, learnt)
    assert other.threshold_digest == stored["detector"]
    with pytest.raises(ArtifactError, match="'false_alarm_rate': 0.2.* give another folder"):
        attack(few, 8, other)

    # The store of an earlier version, which said less, is read and carried on.
    line = json.loads(log.read_text())
    for name in ("kind", "false_alarm_rate", "step", "momentum", "lead"):
        del line["parameters"][name]
    log.write_text(f"{json.dumps(line)}\n")
    assert attack(few, 12, other)[-1] == {**stored, "false_alarm_rate": 0.2}


def test_a_forest_is_attacked_through_an_imitation_and_judged_by_itself(defended, network, digits, victims, caplog):
    clean, calibration = (next(encode_set(network, part)) for part in (digits.fitting.first(200), digits.calibration))
    images = to_tensor(digits.fitting.pixels(slice(0, 200)), CPU)
    attacked = craft(replace(RECIPES["pgd"], budget=48 / 255), network, images, network(images).argmax(dim=1))
    rows = np.concatenate([clean.gate_logits, encode(network, to_tensor(attacked.pixels, CPU)).gate_logits])
    forest = FalseAlarmClassifier(RandomForestClassifier(30, random_state=0)).fit(rows, np.arange(len(rows)) >= 200)
    scores = Calibration(forest.score_samples(calibration.gate_logits))
    bundle = add_detector(defended, replace(defended.detector_info(), features="gates"), forest.estimator_, scores, {})

    with caplog.at_level("INFO"):
        known = defence_of(bundle, bundle.network(), digits.validation)
    selective = next(recipe for recipe in ADAPTIVE if recipe.name == "adaptive-selective")
    crafted = craft(
        replace(selective, budget=48 / 255, settings={"steps": 20, "restarts": 1}), network, *victims, watcher=known
    )

    assert isinstance(known, Defence)
    assert not known.exact
    assert known.spearman > 0.7
    assert known.known["imitation"]["held_out"] == "by image"
    assert f"rank correlation of {known.spearman:.2f} with the real ones" in caplog.text
    evidence = encode(network, to_tensor(crafted.pixels, CPU))
    real = forest.score_samples(evidence.gate_logits)
    assert np.allclose(crafted.scores, real)
    assert np.array_equal(crafted.flagged, real > known.threshold)
    assert crafted.reached.any()


def test_seeing_gradients_is_no_worse_than_seeing_scores(network, defence, victims):
    named = {recipe.name: replace(recipe, budget=32 / 255) for recipe in ADAPTIVE}
    scores = replace(named["adaptive-square"], settings={"queries": 200})
    gradients = replace(named["adaptive-orthogonal"], settings={"steps": 20, "restarts": 1})

    black, white = (craft(recipe, network, *victims, watcher=defence).reached for recipe in (scores, gradients))

    assert 0 < black.mean() <= white.mean()


@pytest.mark.parametrize("name", ["adaptive-square", "adaptive-hopskipjump"])
def test_without_gradients_success_also_grows_with_the_budget_until_every_image_evades(name, network, defence, victims):
    recipe = next(recipe for recipe in ADAPTIVE if recipe.name == name)
    settings = {"queries": 200} if name == "adaptive-square" else {"steps": 4, "restarts": 1}
    images, labels = (part[:8] for part in victims)

    evaded = [
        craft(replace(recipe, budget=budget, settings=settings), network, images, labels, watcher=defence)
        .reached.mean()
        for budget in (8 / 255, 96 / 255, 1.0)
    ]  # fmt: skip

    assert evaded == sorted(evaded)
    assert evaded[1] > evaded[0]
    assert evaded[-1] == 1.0
