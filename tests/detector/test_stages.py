import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from detector.bundle import Bundle
from detector.errors import ArtifactError, DataError, RequestError, TrainingError
from detector.model_card import JSON, MARKDOWN
from detector.network.schedule import Schedule
from detector.stages import import_backbone, make_backbone, make_decoupled

SCHEDULE = Schedule(epochs=2, batch=64, learning_rate=0.05, flip=False)


def ignore(_progress):
    return None


def test_a_bundle_grows_from_backbone_to_decoupled_network(digits, tmp_path):
    bundle, backbone = make_backbone("resnet8", digits, SCHEDULE, tmp_path / "plain", ignore, resize=True)
    grown, figures = make_decoupled(bundle, digits, 0.7, "pathguard", SCHEDULE, tmp_path / "gated", ignore)

    assert figures.backbone_accuracy == backbone.accuracy
    assert 0 < figures.macs_left < 1
    assert figures.path_length == sum(grown.network().layers.values()) == 224
    assert grown.manifest.gates.keep == 0.7
    assert grown.manifest.network.spec.resize
    assert torch.equal(grown.backbone().linear.weight, bundle.backbone().linear.weight)
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "gated").iterdir()) == [
        "MODEL_CARD.md", "backbone", "manifest.json", "model_card.json", "network",
    ]  # fmt: skip
    assert Bundle(tmp_path / "plain").manifest.gates is None


def test_ctrl_c_leaves_a_checkpoint_that_the_same_call_goes_on_from(digits, tmp_path):
    def stop(progress):
        if progress.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_backbone("resnet8", digits, SCHEDULE, tmp_path / "parts", stop)
    parts, _ = make_backbone("resnet8", digits, SCHEDULE, tmp_path / "parts", ignore)
    whole, _ = make_backbone("resnet8", digits, SCHEDULE, tmp_path / "whole", ignore)

    assert parts.manifest.parts == whole.manifest.parts


def test_a_decoupled_network_is_not_decoupled_over(decoupled_bundle, digits):
    with pytest.raises(ArtifactError, match="expected a folder without a decoupled network, got .* give another --out"):
        make_decoupled(decoupled_bundle, digits, 0.7, "pathguard", SCHEDULE, decoupled_bundle.folder, ignore)


def test_a_run_is_not_resumed_on_other_images(digits, tmp_path):
    def stop(progress):
        if progress.epoch == 1:
            raise KeyboardInterrupt

    fewer = replace(digits, train=digits.train.first(640))
    with pytest.raises(KeyboardInterrupt):
        make_backbone("resnet8", fewer, SCHEDULE, tmp_path, stop)

    with pytest.raises(TrainingError, match="expected a checkpoint of training_images 1260, got one of"):
        make_backbone("resnet8", digits, SCHEDULE, tmp_path, ignore)


def test_a_set_whose_files_changed_is_refused(digits, decoupled_bundle, tmp_path):
    changed = replace(digits, train=replace(digits.train, digest="other"))

    with pytest.raises(DataError, match="with other files: its splits would overlap"):
        make_decoupled(decoupled_bundle, changed, 0.7, "pathguard", SCHEDULE, tmp_path / "x", ignore)


def test_a_finished_bundle_is_not_trained_over(digits, tmp_path):
    make_backbone("resnet8", digits, replace(SCHEDULE, epochs=1), tmp_path, ignore)

    with pytest.raises(ArtifactError, match="with a finished one; give another --out"):
        make_backbone("resnet8", digits, SCHEDULE, tmp_path, ignore)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "expected at least 1 epoch"),
        ({"learning_rate": -1.0}, "learning rate above 0, got 2, 64 and -1.0"),
        ({"batch": 5000}, "expected at least one batch of 5000 training images, got 1260"),
    ],
)
def test_schedules_that_cannot_train_are_refused(digits, tmp_path, change, message):
    with pytest.raises(RequestError, match=message):
        make_backbone("resnet8", digits, replace(SCHEDULE, **change), tmp_path, ignore)


@pytest.mark.parametrize("keep", [0.0, -0.2, 1.2, float("nan")])
def test_a_share_that_cannot_be_kept_is_refused_before_the_training(digits, decoupled_bundle, tmp_path, keep):
    with pytest.raises(RequestError, match=rf"expected a share of filters to keep in \(0, 1\], got {keep:g}$"):
        make_decoupled(
            decoupled_bundle, digits, keep, "pathguard", SCHEDULE, tmp_path / "x", lambda _: pytest.fail("it trains")
        )


def test_data_that_does_not_fit_the_backbone_is_refused(digits, decoupled_bundle, tmp_path):
    coloured = replace(digits, train=replace(digits.train, spec=replace(digits.train.spec, channels=3)))

    with pytest.raises(DataError, match="expected images of 8 x 8 grey for .*, got 8 x 8 RGB in digits"):
        make_decoupled(decoupled_bundle, coloured, 0.7, "pathguard", SCHEDULE, tmp_path / "x", ignore)


def test_a_folder_that_cannot_be_written_is_told_in_one_line(digits, tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(ArtifactError, match="expected to write the bundle .*file, got: File exists"):
        make_backbone("resnet8", digits, SCHEDULE, tmp_path / "file", ignore)


def test_a_backbone_trained_elsewhere_is_brought_and_decoupled(digits, tmp_path):
    trained, figures = make_backbone("resnet8", digits, SCHEDULE, tmp_path / "trained", ignore)
    weights = next((tmp_path / "trained").glob("backbone-*.safetensors"))

    bundle, brought = import_backbone("resnet8", weights, digits, tmp_path / "brought")

    assert brought == figures
    assert bundle.manifest.parts == trained.manifest.parts
    make_decoupled(bundle, digits, 0.7, "pathguard", SCHEDULE, tmp_path / "brought", ignore)
    with pytest.raises(ArtifactError, match="got .* with a finished one; give another --out"):
        import_backbone("resnet8", weights, digits, tmp_path / "brought")


def test_only_named_convolutions_are_gated_also_when_the_bundle_is_opened_again(digits, tmp_path):
    bundle, _ = make_backbone("resnet8", digits, SCHEDULE, tmp_path, ignore)

    grown, figures = make_decoupled(
        bundle, digits, 0.7, "pathguard", SCHEDULE, tmp_path, ignore, patterns=("layer[23].*", "*.0.conv1")
    )

    assert [row.layer for row in figures.layers] == [
        "layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2",
    ]  # fmt: skip
    assert list(Bundle(tmp_path).network().layers) == [row.layer for row in figures.layers]
    assert grown.network_digest == Bundle(tmp_path).network_digest


def test_the_card_says_how_each_stage_was_made_and_how_each_layer_does(digits, tmp_path):
    bundle, _ = make_backbone("resnet8", digits, SCHEDULE, tmp_path, ignore, command="pathguard train --seed 0")
    _, figures = make_decoupled(
        bundle, digits, 0.7, "pathguard", SCHEDULE, tmp_path, ignore, command="pathguard decouple --keep 0.7"
    )

    text, facts = (tmp_path / MARKDOWN).read_text(), json.loads((tmp_path / JSON).read_text())

    assert facts["stages"]["network"]["command"] == "pathguard decouple --keep 0.7"
    assert facts["stages"]["network"]["figures"]["layers"][0]["layer"] == "layer1.0.conv1"
    assert facts["stages"]["network"]["figures"]["distinct_paths"] == figures.distinct_paths > 1
    assert facts["gates"]["keep"] == 0.7
    for told in ("pathguard train --seed 0", "| layer3.0.conv2 | 64 |", "one of 10 classes: 0, 1, 2", "70% were asked"):
        assert told in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("answers:fives", r"expected logits of shape \(2, 10\) for two images, got \(2, 5\) from answers:fives"),
        ("answers:coloured", "expected a network for images of 8 x 8 grey, got answers:coloured, which fails on them"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_refused(digits, tmp_path, monkeypatch, name, message):
    (tmp_path / "answers.py").write_text(
        "from torch import nn\n"
        "def fives(channels, classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))\n"
        "def coloured(channels, classes): return nn.Conv2d(3, classes, 8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(RequestError, match=message):
        make_backbone(name, digits, SCHEDULE, tmp_path / "bundle", ignore)


def test_a_class_without_images_is_named(digits, tmp_path):
    without_threes = replace(digits, train=digits.train.subset(np.flatnonzero(digits.train.labels != 3)))

    with pytest.raises(DataError, match="expected training images of every class, got none of 3"):
        make_backbone("resnet8", without_threes, SCHEDULE, tmp_path, ignore)


TIED = (
    "from torch import nn\n"
    "class Tied(nn.Module):\n"
    "    def __init__(self, channels, classes):\n"
    "        super().__init__()\n"
    "        def part(wide): return nn.Sequential(nn.Conv2d(wide, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())\n"
    "        self.body = nn.Sequential(part(channels), part(8))\n"
    "        self.linear = nn.Linear(8, classes)\n"
    "        self.head = self.linear\n"
    "    def forward(self, images):\n"
    "        return self.head(self.body(images).mean(dim=(2, 3)))\n"
)


def test_layers_that_are_used_under_two_names_are_kept(digits, tmp_path, monkeypatch):
    (tmp_path / "tied_layers.py").write_text(TIED)
    monkeypatch.syspath_prepend(tmp_path)

    bundle, _ = make_backbone("tied_layers:Tied", digits, SCHEDULE, tmp_path / "b", ignore)
    make_decoupled(bundle, digits, 0.7, "pathguard", SCHEDULE, tmp_path / "b", ignore)

    reopened = Bundle(tmp_path / "b", trusted="tied_layers:Tied").network()
    assert list(reopened.layers) == ["body.1.0"]
    with pytest.raises(RequestError, match="expected leave to run the code of tied_layers:Tied"):
        Bundle(tmp_path / "b").network()


def test_another_backbone_is_not_written_over(digits, tmp_path):
    one, _ = make_backbone("resnet8", digits, SCHEDULE, tmp_path / "one", ignore)
    make_backbone("resnet8", digits, replace(SCHEDULE, seed=1), tmp_path / "other", ignore)

    with pytest.raises(ArtifactError, match="expected a new folder or that of the backbone, got .*other"):
        make_decoupled(one, digits, 0.7, "pathguard", SCHEDULE, tmp_path / "other", ignore)


def test_an_interrupted_run_goes_on_only_with_the_same_gates(digits, tmp_path):
    def stop(progress):
        if progress.epoch == 1:
            raise KeyboardInterrupt

    bundle, _ = make_backbone("resnet8", digits, SCHEDULE, tmp_path, ignore)
    with pytest.raises(KeyboardInterrupt):
        make_decoupled(bundle, digits, 0.7, "pathguard", SCHEDULE, tmp_path, stop, patterns=("layer1.0.conv1",))

    with pytest.raises(TrainingError, match=r"expected a checkpoint of gates\.layer1.0.conv1 None, got one of .* 16"):
        make_decoupled(bundle, digits, 0.7, "pathguard", SCHEDULE, tmp_path, ignore, patterns=("layer1.0.conv2",))
