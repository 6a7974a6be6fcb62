import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from detector.errors import TrainingError
from detector.network.checkpoint import FILE
from detector.network.decouple import decouple
from detector.network.losses import OBJECTIVES
from detector.network.networks import build_network
from detector.network.schedule import Schedule
from detector.network.training import (
    accuracy,
    measure_gates,
    pixel_statistics,
    train_backbone,
    train_decoupled,
)
from tests.conftest import digit_splits, in_a_process_of_its_own

SCHEDULE = Schedule(epochs=2, batch=64, learning_rate=0.05, flip=False)


def ignore(_progress):
    return None


def weights(network):
    return torch.cat([value.flatten().float() for value in network.state_dict().values()])


def trained(digits, folder, schedule=SCHEDULE, listen=ignore):
    torch.manual_seed(schedule.seed)
    network = build_network("resnet8", 1, 10)
    train_backbone(network, digits, schedule, folder, {"network": "resnet8"}, listen)
    return network


def test_training_learns_real_digits(digits, tmp_path):
    network = trained(digits, tmp_path, replace(SCHEDULE, epochs=4))

    assert accuracy(network, digits.held_out) > 0.7
    assert not network.training


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(digits, tmp_path):
    one = trained(digits, tmp_path / "a")
    two = trained(digits, tmp_path / "b")
    other = trained(digits, tmp_path / "c", replace(SCHEDULE, seed=1))

    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))


def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_weights(digits, tmp_path):
    whole = trained(digits, tmp_path / "whole")
    steps = []

    def stop_in_the_second_epoch(progress):
        if progress.epoch == 1 and progress.step == progress.steps - 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(digits, tmp_path / "parts", listen=stop_in_the_second_epoch)
    resumed = trained(digits, tmp_path / "parts", listen=lambda progress: steps.append(progress.step))

    assert steps[0] == len(digits.train) // SCHEDULE.batch
    assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_decoupled_network_trains_under_every_objective(digits, tmp_path, objective):
    backbone = trained(digits, tmp_path / "backbone")
    network = decouple(backbone, 0.7, OBJECTIVES[objective].normalised)
    before = weights(network)

    train_decoupled(network, backbone, digits, OBJECTIVES[objective], 0.7, SCHEDULE, tmp_path, {}, ignore)

    assert not torch.equal(weights(network), before)
    figures = measure_gates(network, digits.validation)
    assert 0 <= figures.input_dependent <= 1
    assert 0 < figures.keep_ratio <= 1


def test_a_training_that_is_partly_behind_begins_with_the_noise_of_there(digits, tmp_path, monkeypatch):
    network = decouple(build_network("resnet8", 1, 10), 0.7)
    noises = []
    monkeypatch.setattr(network, "set_noise", noises.append)
    schedule = replace(SCHEDULE, epochs=1, batch=600)

    train_decoupled(
        network, build_network("resnet8", 1, 10), digits, OBJECTIVES["pathguard"], 0.7, schedule, tmp_path, {}, ignore,
        behind=0.6,
    )  # fmt: skip

    assert noises == pytest.approx([1 - 0.6 / 0.8, 0.0])


def test_a_network_settles_on_gates_that_are_held(digits, tmp_path):
    backbone = trained(digits, tmp_path / "backbone")
    network, seen = decouple(backbone, 0.7), []
    schedule = replace(SCHEDULE, epochs=4, settling=0.5)

    def note(progress):
        if progress.step == progress.steps // 2:
            seen.append((weights(network), [value.clone() for gate in network.gates() for value in gate.parameters()]))

    train_decoupled(network, backbone, digits, OBJECTIVES["pathguard"], 0.7, schedule, tmp_path, {}, note)

    rest, gates = seen[0]
    held = [value for gate in network.gates() for value in gate.parameters()]
    assert all(torch.equal(before, after) for before, after in zip(gates, held, strict=True))
    assert not torch.equal(rest, weights(network))
    assert all(value.requires_grad for value in held)
    assert all(gate.noise == 0 for gate in network.gates())


def test_gate_statistics_count_what_a_plain_loop_counts(digits):
    network = decouple(build_network("resnet8", 1, 10)).eval()
    images = digits.validation

    figures = measure_gates(network, images, batch=7)

    pixels = torch.from_numpy(images.pixels(slice(None))).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        _, readings = network.trace(pixels)
    masks = torch.cat([reading.mask for reading in readings.values()], dim=1)
    share = masks.mean(dim=0)
    assert figures.keep_ratio == pytest.approx(masks.mean().item(), abs=2e-3)
    assert figures.input_dependent == pytest.approx(((share >= 0.01) & (share <= 0.99)).float().mean().item(), abs=0.02)


def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_what_is_left(digits, tmp_path):
    with pytest.raises(
        TrainingError, match=r"got (nan|inf) at step \d+ of 38; no epoch was finished; try a smaller learning rate"
    ):
        trained(digits, tmp_path, replace(SCHEDULE, learning_rate=1e12))


def test_a_checkpoint_of_another_run_is_refused_by_name(digits, tmp_path):
    trained(digits, tmp_path)

    with pytest.raises(TrainingError, match="expected a checkpoint of schedule.seed 1, got one of schedule.seed 0"):
        trained(digits, tmp_path, replace(SCHEDULE, seed=1))


def test_a_damaged_checkpoint_is_refused_in_one_line(digits, tmp_path):
    trained(digits, tmp_path)
    (tmp_path / FILE).write_bytes(b"not a checkpoint")

    with pytest.raises(TrainingError, match="expected a whole checkpoint") as caught:
        trained(digits, tmp_path)
    assert "\n" not in str(caught.value)


def test_pixel_statistics_are_those_of_the_images(digits):
    mean, std = pixel_statistics(digits.train)

    pixels = digits.train.pixels(slice(None)) / 255
    assert mean.item() == pytest.approx(pixels.mean(), abs=1e-4)
    assert std.item() == pytest.approx(pixels.std(), abs=1e-4)
    assert np.isfinite(mean.item())


def test_the_epoch_that_does_best_on_the_validation_images_remains_also_after_an_interruption(
    digits, tmp_path, monkeypatch
):
    schedule, kept = replace(SCHEDULE, epochs=4), {}
    answers = iter([0.5, 0.9, 0.6, 0.6, 0.7])  # the third epoch is measured again when the run is resumed
    monkeypatch.setattr("detector.network.training.accuracy", lambda *_: next(answers))
    network = build_network("resnet8", 1, 10)

    def stop_in_the_last_epoch(progress):
        if progress.step % 19 == 0:
            kept.setdefault(progress.step, weights(network))
        if progress.step == progress.steps - 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_backbone(network, digits, schedule, tmp_path, {}, stop_in_the_last_epoch)
    resumed = build_network("resnet8", 1, 10)
    train_backbone(resumed, digits, schedule, tmp_path, {}, ignore)

    assert torch.equal(weights(resumed), kept[38])
    assert not torch.equal(weights(resumed), kept[57])


def test_only_an_epoch_without_noise_and_with_the_share_asked_for_is_chosen(digits, tmp_path):
    backbone = trained(digits, tmp_path / "backbone")
    network = decouple(backbone, 0.7)
    schedule, seen = replace(SCHEDULE, epochs=10), []

    train_decoupled(
        network, backbone, digits, OBJECTIVES["pathguard"], 0.7, schedule, tmp_path, {},
        lambda progress: seen.append((progress.epoch, dict(progress.figures))),
    )  # fmt: skip

    figures = measure_gates(network, digits.validation)
    late = [f for epoch, f in seen if epoch >= 8 and abs(f["keep_ratio"] - 0.7) <= 0.02]
    assert figures.accuracy == pytest.approx(max(f["accuracy"] for f in late) if late else seen[-1][1]["accuracy"])


def train_until_killed(folder):
    """Train, and be killed at the 30th step: no handler, no clean-up."""

    def kill(progress):
        if progress.step == 30:
            os.kill(os.getpid(), signal.SIGKILL)

    trained(digit_splits(), Path(folder), replace(SCHEDULE, epochs=3), kill)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights(digits, tmp_path):
    schedule = replace(SCHEDULE, epochs=3)
    whole = trained(digits, tmp_path / "whole", schedule)
    ended = in_a_process_of_its_own(train_until_killed, tmp_path / "killed")

    resumed = trained(digits, tmp_path / "killed", schedule)

    assert ended == -signal.SIGKILL
    assert torch.equal(weights(whole), weights(resumed))
