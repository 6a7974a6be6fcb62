import numpy as np
import pytest
import torch

from detector.errors import PathShapeError, RequestError
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.paths.columns import Column
from detector.paths.encoder import Evidence, encode, encode_set
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import FEATURES, features_named
from detector.paths.gate_inputs import GateInputs


@pytest.fixture
def network():
    return decouple(build_network("resnet8", 1, 10)).eval()


def test_an_image_has_the_same_evidence_alone_and_in_a_batch(network, digits):
    images = digits.test.first(6)

    together = Evidence.stacked(encode_set(network, images, batch=6))
    alone = Evidence.stacked(encode_set(network, images, batch=1))

    np.testing.assert_allclose(together.gate_logits, alone.gate_logits, atol=1e-4)
    sure = np.abs(together.gate_logits) > 1e-4
    assert np.array_equal(together.path.bits[sure], alone.path.bits[sure])


def test_path_bits_say_where_a_gate_logit_is_above_zero(network):
    evidence = encode(network, torch.rand(3, 1, 8, 8))

    assert np.array_equal(evidence.path.bits, evidence.gate_logits > 0)
    assert dict(evidence.path.layers) == network.layers
    assert evidence.class_logits.shape == (3, 10)


def test_margins_lead_from_the_first_class_in_order(network):
    evidence = encode(network, torch.rand(4, 1, 8, 8))

    margins = features_named("margins", EvidenceShape.of(evidence)).fit_transform(rows_of(evidence))

    ordered = np.sort(evidence.class_logits, axis=1)
    np.testing.assert_allclose(margins[:, 0], ordered[:, -1] - ordered[:, -2])
    assert margins.shape == (4, 9)
    assert (np.diff(margins, axis=1) >= 0).all()


def test_doubts_are_one_at_the_boundary_and_order_images_as_the_largest_probability_does():
    logits = np.array([[2, 2, 0], [9, 0, 0], [0, 1, 0]], np.float32)
    rows = np.concatenate([logits, np.zeros((3, 4), np.float32)], axis=1)

    seen = features_named("doubts", EvidenceShape(3, {"a": 4})).fit_transform(rows)

    np.testing.assert_allclose(seen[0], [1, np.exp(-2), np.log(1 + np.exp(-2))], rtol=1e-6)
    probabilities = np.exp(logits).max(axis=1) / np.exp(logits).sum(axis=1)
    np.testing.assert_allclose(seen[:, -1], np.log((1 - probabilities) / probabilities), rtol=1e-4)


def test_all_features_are_the_others_side_by_side(network):
    evidence = encode(network, torch.rand(2, 1, 8, 8))

    def columns(text):
        return features_named(text, EvidenceShape.of(evidence)).fit(rows_of(evidence)).of(evidence)

    assert np.array_equal(columns("all"), np.concatenate([columns(name) for name in FEATURES], axis=1))
    assert np.array_equal(columns("margins+bits"), columns("bits+margins"))


@pytest.mark.parametrize("text", ["pixels", "bits+pixels", "bits+bits", ""])
def test_unknown_features_are_refused_with_the_known_ones(text):
    with pytest.raises(RequestError, match="expected features of bits, gates, inputs, .*, joined by .*, or all; got"):
        features_named(text, EvidenceShape(10, {"gate": 2}))


def test_every_column_has_a_name_that_is_read_back(network):
    evidence = encode(network, torch.rand(9, 1, 8, 8))
    features = features_named("all", EvidenceShape.of(evidence)).fit(rows_of(evidence))

    names = features.get_feature_names_out()

    assert len(names) == features.transform(rows_of(encode(network, torch.rand(2, 1, 8, 8)))).shape[1]
    assert len(set(names)) == len(names)
    assert [Column.of_name(name) for name in names] == features.columns()
    assert names[3] == f"bits:{next(iter(network.layers))}[3]"
    with pytest.raises(RequestError, match="expected the name of a column such as"):
        Column.of_name("no name")


def test_a_column_of_gates_is_the_filter_that_its_name_says(network):
    evidence = encode(network, torch.rand(3, 1, 8, 8))
    features = features_named("gates", EvidenceShape.of(evidence)).fit(rows_of(evidence))

    layer, place = list(network.layers)[2], 5
    column = features.columns().index(Column("gates", layer, place))

    network.eval()
    with torch.inference_mode():
        _, readings = network.trace(torch.rand(1, 1, 8, 8))
    before = sum(list(network.layers.values())[:2])
    assert readings[layer].logits.shape[1] == network.layers[layer]
    assert np.array_equal(features.of(evidence)[:, column], evidence.gate_logits[:, before + place])


def test_a_column_of_inputs_is_the_mean_of_the_channel_that_its_gate_reads(network):
    images = torch.rand(3, 1, 8, 8)
    evidence = encode(network, images)
    features = features_named("inputs", EvidenceShape.of(evidence)).fit(rows_of(evidence))
    layer = list(network.layers)[2]
    read = []
    gate = network.gates()[2]
    handle = gate.register_forward_pre_hook(lambda _, args: read.append(args[0].mean(dim=(2, 3))))
    with torch.inference_mode():
        network(images)
    handle.remove()

    column = features.columns().index(Column("inputs", layer, 5))

    assert network.reads[layer] == read[0].shape[1]
    np.testing.assert_allclose(features.of(evidence)[:, column], read[0][:, 5].numpy(), rtol=1e-5)


def test_rows_are_read_back_as_the_evidence_that_they_are_of(network):
    evidence = encode(network, torch.rand(3, 1, 8, 8))

    again = EvidenceShape.of(evidence).evidence(rows_of(evidence))

    assert np.array_equal(again.class_logits, evidence.class_logits)
    assert np.array_equal(again.gate_logits, evidence.gate_logits)
    assert np.array_equal(again.path.bits, evidence.path.bits)
    assert np.array_equal(again.inputs.means, evidence.inputs.means)
    assert again.inputs.reads == network.reads
    with pytest.raises(PathShapeError, match=r"expected means of shape \(images, .*\), got \(3, 2\)"):
        GateInputs(evidence.inputs.means[:, :2], network.reads)


def test_rows_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"expected rows of 3 class logits, 4 gate logits and 0 gate inputs, got 6"):
        features_named("gates", EvidenceShape(3, {"a": 4})).fit(np.zeros((2, 6)))
