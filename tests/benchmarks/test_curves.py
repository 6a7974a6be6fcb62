from dataclasses import replace

import pytest
import torch

from benchmarks.curves import decoupled_bundles, make, pruned_networks, tighten
from benchmarks.pruned import macs
from detector.errors import ArtifactError
from detector.network.schedule import Schedule
from detector.network.training import accuracy, measure_gates

SHORT = Schedule(epochs=1, batch=200, learning_rate=0.01)


def test_gates_are_tightened_to_the_share_of_filters_that_is_asked_for(decoupled_bundle, digits):
    network = decoupled_bundle.network()

    tighten(network, digits.train.subset(slice(0, 100)), 0.4)

    assert measure_gates(network, digits.train.subset(slice(0, 100))).keep_ratio == pytest.approx(0.4, abs=0.02)


def test_each_name_becomes_a_network_that_is_found_again_and_not_trained_anew(decoupled_bundle, digits, tmp_path):
    for name in ("keep0.5", "pruned0.5"):
        make(name, decoupled_bundle, digits, tmp_path, SHORT)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}

    for name in ("keep0.5", "pruned0.5"):
        make(name, decoupled_bundle, digits, tmp_path, SHORT)

    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()} == written
    start, further = decoupled_bundles(decoupled_bundle, tmp_path)
    assert start.folder == decoupled_bundle.folder
    assert further.manifest.gates.keep == 0.5
    assert measure_gates(further.network(), digits.validation).keep_ratio == pytest.approx(0.5, abs=0.15)
    [smaller] = pruned_networks(decoupled_bundle, tmp_path)
    image = torch.rand(1, 1, 8, 8)
    assert 0.4 < macs(smaller.network, image) / macs(decoupled_bundle.backbone(), image) < 0.6
    assert smaller.validated == accuracy(smaller.network, digits.validation)


def test_an_interrupted_training_goes_on_to_what_it_would_have_been(decoupled_bundle, digits, tmp_path):
    both = replace(SHORT, epochs=2)
    images = replace(digits, train=digits.train.subset(slice(0, 400)))
    make("pruned0.4", decoupled_bundle, images, tmp_path / "whole", both)

    reads = 0

    def read(ids):
        nonlocal reads
        reads += 1
        if reads == 3:  # in the second epoch
            raise KeyboardInterrupt
        return images.train.read(ids)

    with pytest.raises(KeyboardInterrupt):
        make("pruned0.4", decoupled_bundle, replace(images, train=replace(images.train, read=read)), tmp_path, both)
    make("pruned0.4", decoupled_bundle, images, tmp_path, both)

    [whole], [resumed] = (pruned_networks(decoupled_bundle, work) for work in (tmp_path / "whole", tmp_path))
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name


def test_networks_made_of_another_bundle_are_refused(decoupled_bundle, digits, tmp_path):
    make("pruned0.5", decoupled_bundle, digits, tmp_path / "work", SHORT)
    facts = next(tmp_path.rglob("facts.json"))
    facts.write_text(facts.read_text().replace(decoupled_bundle.backbone_digest, "0" * 64))

    with pytest.raises(ArtifactError, match="expected a network made of"):
        pruned_networks(decoupled_bundle, tmp_path / "work")
