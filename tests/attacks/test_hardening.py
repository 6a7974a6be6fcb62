from dataclasses import replace

import numpy as np
import pytest
import torch

from attacks import hardening as hardening_module
from attacks.hardening import Hardening, evading, harden, robust_accuracy
from detector.batches import to_tensor
from detector.bundle import Bundle, GatesInfo, add_network
from detector.errors import ArtifactError, RequestError, TrainingError
from detector.model_card import MARKDOWN
from detector.network.decouple import decouple
from detector.network.schedule import Schedule

BUDGET = 24 / 255
FEW = Schedule(epochs=3, batch=60, learning_rate=0.05, flip=False)


def ignore(_progress):
    return None


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A network that has learnt digits."""
    from detector.bundle import NetworkInfo, begin_bundle
    from detector.network.networks import build_network
    from detector.network.training import train_backbone

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    backbone = build_network("resnet8", 1, 10)
    schedule = Schedule(epochs=8, batch=64, learning_rate=0.1, flip=False)
    train_backbone(backbone, digits, schedule, folder / "checkpoints", {}, ignore)
    info = NetworkInfo("resnet8", digits.train.class_names, digits.train.spec, "digits", "digits")
    bundle = begin_bundle(folder / "bundle", info, backbone, {"figures": {}})
    return add_network(bundle, folder / "bundle", GatesInfo(0.9, True, "pathguard"), decouple(backbone, 0.9), {})


def test_evading_images_stay_within_the_budget_and_half_of_them_take_anothers_path(trained, digits):
    labels = torch.arange(8)  # no two alike, so that each image has one guide
    first = [int((digits.train.labels == label).argmax()) for label in labels.tolist()]
    network, images = trained.network(), to_tensor(digits.train.pixels(np.array(first)), torch.device("cpu"))
    wanted = [weights.requires_grad for weights in network.parameters()]

    points = evading(network, images, labels, Hardening(budget=BUDGET, steps=10, weight=10.0))

    assert ((points - images).abs() <= BUDGET + 1e-6).all()
    assert points.min() >= 0
    assert points.max() <= 1
    assert [weights.requires_grad for weights in network.parameters()] == wanted

    def gates(of):
        return torch.cat([reading.logits for reading in network.trace(of)[1].values()], dim=1)

    likely = network(images)[:, labels].masked_fill(labels[:, None] == labels, -torch.inf)
    guides = gates(images)[likely.argmax(dim=1)]
    before, after = ((gates(of) - guides).square().mean(dim=1)[4:] for of in (images, points))
    assert after.mean() < before.mean()


def test_a_hardened_network_withstands_more_and_its_price_is_stated(trained, digits, tmp_path):
    hardening = Hardening("network", BUDGET, steps=3)
    grown, figures = harden(trained, digits, hardening, FEW, tmp_path / "hard", ignore)

    assert figures.robust > figures.robust_before
    assert figures.accuracy > 0.5
    judged = digits.validation.first(300)
    assert figures.robust == robust_accuracy(Bundle(grown.folder).network(), judged, hardening)
    assert grown.manifest.training["network"]["figures"]["accuracy_before"] == figures.accuracy_before
    assert grown.manifest.detector is None
    assert not (grown.folder / "checkpoint-hardening").exists()
    with pytest.raises(ArtifactError, match="expected a folder without a bundle"):
        harden(trained, digits, hardening, FEW, tmp_path / "hard", ignore)


def test_where_all_labels_are_one_images_are_attacked_plainly(trained):
    network, images, labels = trained.network(), torch.rand(4, 1, 8, 8), torch.full((4,), 3)

    torch.manual_seed(0)
    alike = evading(network, images, labels, Hardening(budget=BUDGET, steps=3, weight=10.0))
    torch.manual_seed(0)
    plain = evading(network, images, labels, Hardening(budget=BUDGET, steps=3, weight=0.0))

    assert torch.equal(alike, plain)


def test_few_steps_can_reach_the_end_of_the_budget(trained):
    network, images = trained.network(), torch.full((4, 1, 8, 8), 0.5)

    points = evading(network, images, torch.arange(4), Hardening(budget=BUDGET, steps=1))

    assert ((points - images).abs() >= BUDGET - 1e-6).float().mean() > 0.5


def test_trades_is_another_loss(trained, digits, tmp_path):
    few, once = replace(digits, train=digits.train.first(120)), replace(FEW, epochs=1)
    plain, _ = harden(trained, few, Hardening(budget=BUDGET), once, tmp_path / "plain", ignore)
    trades, _ = harden(trained, few, Hardening(budget=BUDGET, trade=6.0), once, tmp_path / "trades", ignore)

    assert plain.network_digest != trades.network_digest


def test_hardening_the_gates_leaves_everything_else_as_it_was(trained, digits, tmp_path):
    once = replace(FEW, epochs=1)
    grown, _ = harden(trained, digits, Hardening("gates", BUDGET, steps=2), once, tmp_path / "gates", ignore)

    before, after = trained.network().state_dict(), grown.network().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".gates." in name for name in changed)


def test_hardening_is_not_resumed_on_other_images(trained, digits, tmp_path):
    def stop(progress):
        if progress.epoch == 1:
            raise KeyboardInterrupt

    quick = Hardening("gates", BUDGET, steps=1)
    fewer = replace(digits, train=digits.train.first(240))
    with pytest.raises(KeyboardInterrupt):
        harden(trained, fewer, quick, FEW, tmp_path, stop)

    with pytest.raises(TrainingError, match="expected a checkpoint of training_images 1260, got one of"):
        harden(trained, digits, quick, FEW, tmp_path, ignore)


def test_an_interruption_between_hardened_bundle_and_card_costs_no_card(trained, digits, tmp_path, monkeypatch):
    def killed(_bundle):
        raise KeyboardInterrupt

    quick, few = Hardening("gates", BUDGET, steps=1), replace(digits, train=digits.train.first(120))
    monkeypatch.setattr(hardening_module, "write_card", killed)
    with pytest.raises(KeyboardInterrupt):
        harden(trained, few, quick, replace(FEW, epochs=1), tmp_path, ignore)
    assert not (tmp_path / MARKDOWN).exists()

    with pytest.raises(ArtifactError, match="expected a folder without a bundle"):
        harden(trained, few, quick, replace(FEW, epochs=1), tmp_path, ignore)
    assert (tmp_path / MARKDOWN).exists()
    assert not (tmp_path / "checkpoint-hardening").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"learning_rate": 0.0}, "learning rate above 0"), ({"batch": 5000}, "expected at least one batch of 5000")],
)
def test_hardening_that_cannot_train_is_refused(trained, digits, tmp_path, change, message):
    with pytest.raises(RequestError, match=message):
        harden(trained, digits, Hardening(steps=1), replace(FEW, epochs=1, **change), tmp_path, ignore)


def test_hardening_into_a_folder_that_cannot_be_written_is_told_in_one_line(trained, digits, tmp_path):
    (tmp_path / "file").touch()
    few = replace(digits, train=digits.train.first(120))

    with pytest.raises(ArtifactError, match="expected to write the bundle .*file, got: File exists"):
        harden(trained, few, Hardening("gates", steps=1), replace(FEW, epochs=1), tmp_path / "file", ignore)


def test_hardening_that_makes_no_sense_is_refused():
    with pytest.raises(RequestError, match="expected gates or network to harden, got 'head'"):
        Hardening("head")
    with pytest.raises(RequestError, match="expected a budget in"):
        Hardening(budget=0)
