import pytest
import torch

from benchmarks.published import MEAN, STD, load_published
from detector.errors import ArtifactError
from detector.network.resnet import SmallResNet


def save_as_published(file, network):
    weights = {
        f"module.{name}": values
        for name, values in network.state_dict().items()
        if not name.startswith("normalise.") and not name.endswith("num_batches_tracked")
    }
    torch.save({"state_dict": weights, "best_prec1": 91.0}, file)


@pytest.mark.parametrize("depth", [8, 20])
def test_a_published_file_gives_the_logits_of_the_network_that_it_was_saved_from(tmp_path, depth):
    network = SmallResNet(depth, 3, 10).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    network.normalise.set_statistics(torch.tensor(MEAN), torch.tensor(STD))
    save_as_published(tmp_path / "weights.th", network)

    images = torch.rand(2, 3, 32, 32)

    assert torch.equal(load_published(tmp_path / "weights.th")(images), network(images))


def test_other_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(ArtifactError, match="expected published ResNet weights in .*absent"):
        load_published(tmp_path / "absent")
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ArtifactError, match="expected published ResNet weights in .*text"):
        load_published(tmp_path / "text")
    torch.save({"state_dict": {"module.other": torch.zeros(1)}}, tmp_path / "other")
    with pytest.raises(ArtifactError, match="expected the layers of an option-A ResNet"):
        load_published(tmp_path / "other")
