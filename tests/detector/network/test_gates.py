import math

import pytest
import torch

from detector.network.gates import (
    ChannelGate,
    firing_probability,
    offset_for,
    round_straight_through,
    saturating_sigmoid,
)


def test_each_image_is_gated_alone():
    gate = ChannelGate(8, 6).eval()
    images = torch.randn(5, 8, 4, 4)

    alone = torch.cat([gate.read(image[None]).mask for image in images])

    torch.testing.assert_close(gate.read(images).mask, alone)


def test_the_test_time_mask_says_where_the_logit_is_above_zero_and_never_changes():
    gate = ChannelGate(8, 6).eval()
    images = torch.randn(5, 8, 4, 4)

    first, second = gate.read(images), gate.read(images)

    assert torch.equal(first.mask, (first.logits > 0).float())
    assert torch.equal(first.mask, second.mask)


def test_a_closed_filter_is_exactly_zero_and_an_open_one_is_untouched():
    gate = ChannelGate(3, 16).eval()
    output = torch.randn(4, 16, 5, 5)

    gated, reading = gate(torch.randn(4, 3, 5, 5), output)

    closed = reading.mask == 0
    assert closed.any()
    assert not closed.all()
    assert (gated[closed] == 0).all()
    assert torch.equal(gated[~closed], output[~closed])


def test_in_training_masks_are_soft_or_hard_by_a_coin_per_image():
    gate = ChannelGate(4, 32).train()

    mask = gate.read(torch.randn(200, 4, 3, 3)).mask

    hard = ((mask == 0) | (mask == 1)).all(dim=1)
    assert 60 <= int(hard.sum()) <= 140
    assert mask.min() >= 0
    assert mask.max() <= 1


def test_without_noise_training_uses_the_mask_of_test_time():
    gate = ChannelGate(4, 32).train()
    gate.noise = 0.0

    reading = gate.read(torch.randn(200, 4, 3, 3))

    assert torch.equal(reading.mask, (reading.logits > 0).float())


def test_an_attacker_gets_a_gradient_through_the_gate_unless_it_is_frozen():
    gate = ChannelGate(4, 8).eval()
    features = torch.randn(2, 4, 3, 3, requires_grad=True)

    through = torch.autograd.grad(gate.read(features).mask.sum(), features)[0]
    gate.frozen = True

    assert through.abs().sum() > 0
    assert not gate.read(features).mask.requires_grad


def test_the_straight_through_mask_is_hard_with_the_gradient_of_the_soft_one():
    logits = torch.tensor([-1.0, 0.5, 9.0], requires_grad=True)

    mask = round_straight_through(logits, saturating_sigmoid(logits))
    mask.sum().backward()

    assert mask.tolist() == [0.0, 1.0, 1.0]
    sigmoid = torch.sigmoid(torch.tensor([-1.0, 0.5]))
    torch.testing.assert_close(logits.grad, torch.cat([1.2 * sigmoid * (1 - sigmoid), torch.zeros(1)]))


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.9])
def test_a_fresh_normalised_gate_keeps_the_share_that_was_asked_for(keep):
    gate = ChannelGate(16, 64, keep)
    gate.train()
    gate.noise = 0.0

    logits = gate.read(torch.randn(2000, 16, 4, 4)).logits

    assert abs((logits > 0).float().mean().item() - keep) < 0.05


def test_the_published_gate_starts_open_with_biases_of_one():
    gate = ChannelGate(16, 8, normalised=False)

    assert torch.equal(gate.squeeze.bias, torch.ones(4))
    assert torch.equal(gate.excite.bias, torch.ones(8))


def test_firing_probability_is_the_normal_distribution_function():
    logits = torch.tensor([-1.0, 0.0, 1.0])

    expected = torch.tensor([0.158655, 0.5, 0.841345])

    torch.testing.assert_close(firing_probability(logits), expected, atol=1e-5, rtol=0)
    assert offset_for(0.841345) == pytest.approx(1.0, abs=1e-3)
    assert math.isfinite(offset_for(1.0))
