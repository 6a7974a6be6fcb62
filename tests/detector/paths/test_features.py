import numpy as np
import pytest
import torch

from detector.errors import RequestError
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.paths.encoder import Evidence, encode, encode_set
from detector.paths.features import FEATURES, class_margins, features_named


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


def test_no_more_parts_are_read_than_are_asked_for(network, digits):
    parts = encode_set(network, digits.test.first(30), batch=10)

    some = Evidence.stacked(parts, at_most=11)

    assert len(some) == 20
    assert len(next(parts)) == 10
    assert Evidence.stacked([]) is None


def test_path_bits_say_where_a_gate_logit_is_above_zero(network):
    evidence = encode(network, torch.rand(3, 1, 8, 8))

    assert np.array_equal(evidence.path.bits, evidence.gate_logits > 0)
    assert dict(evidence.path.layers) == network.layers
    assert evidence.class_logits.shape == (3, 10)


def test_margins_lead_from_the_first_class_in_order(network):
    evidence = encode(network, torch.rand(4, 1, 8, 8))

    margins = class_margins(evidence)

    ordered = np.sort(evidence.class_logits, axis=1)
    np.testing.assert_allclose(margins[:, 0], ordered[:, -1] - ordered[:, -2])
    assert margins.shape == (4, 9)
    assert (np.diff(margins, axis=1) >= 0).all()


def test_all_features_are_the_others_side_by_side(network):
    evidence = encode(network, torch.rand(2, 1, 8, 8))

    parts = [FEATURES[name](evidence) for name in ("bits", "gates", "margins")]

    assert np.array_equal(FEATURES["all"](evidence), np.concatenate(parts, axis=1))


def test_unknown_features_are_refused_with_the_known_ones():
    with pytest.raises(RequestError, match="expected features of bits, gates, margins, all; got 'pixels'"):
        features_named("pixels")
