from dataclasses import replace

import pytest
import torch

from detector.errors import TrainingError
from detector.network.networks import build_network
from detector.network.schedule import Schedule
from detector.network.training import ALONE, Team, accuracy, train_backbone
from detector.stages import make_backbone
from tests.cluster.conftest import WITHOUT_RAY

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]


class StoppedError(Exception):
    pass


@pytest.mark.ray
def test_a_team_trains_a_network_and_goes_on_as_a_team_of_another_size(cluster_address, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # how soon the end is noticed
    from cluster.training import ray_training

    schedule = Schedule(3, 64, 0.05, flip=False)
    few = replace(digits, train=digits.train.first(640))
    run = {"stage": "backbone"}
    torch.manual_seed(0)
    network, told = build_network("resnet8", 1, 10), []

    def stop_after_one(progress):
        if progress.epoch == 1 and progress.figures:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_backbone(network, few, schedule, tmp_path, run, stop_after_one, ALONE)
    with ray_training(cluster_address) as training:
        assert training.workers == 2
        training(network, few, schedule, tmp_path, run, told.append)

    assert told[-1].epoch == 3
    assert accuracy(network, few.held_out) > 0.3

    again = build_network("resnet8", 1, 10)
    train_backbone(again, few, schedule, tmp_path, run, lambda _: None, ALONE)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.ray
def test_a_team_larger_than_a_batch_is_refused(digits, tmp_path):
    pytest.importorskip("ray", reason=WITHOUT_RAY)
    from cluster.training import RayTraining

    with pytest.raises(TrainingError, match="expected batches of at least 16 images for 8 workers, got 8"):
        make_backbone("resnet8", digits, Schedule(1, 8), tmp_path / "bundle", lambda _: None, training=RayTraining(8))
    assert not (tmp_path / "bundle" / "manifest.json").exists()


def test_the_shares_of_a_batch_are_the_whole_batch(digits, tmp_path):
    """Gradients averaged over the shares of a team are those of the whole batch: one step, plain SGD, no batch norm."""

    def linear():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    schedule = Schedule(1, 50, 0.1, weight_decay=0.0)
    few = replace(digits, train=digits.train.first(50))
    alone = linear()
    train_backbone(alone, few, schedule, tmp_path / "alone", {}, lambda _: None)
    moved = []
    for rank in range(3):
        shared = linear()
        before = shared[1].weight.detach().clone()
        train_backbone(shared, few, schedule, tmp_path / str(rank), {}, lambda _: None, Team(rank, 3))
        moved.append(shared[1].weight.detach() - before)

    torch.testing.assert_close(linear()[1].weight + torch.stack(moved).mean(dim=0), alone[1].weight)
