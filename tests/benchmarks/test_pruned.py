import torch

from benchmarks.pruned import like, macs, pruned
from detector.network.networks import build_network
from detector.network.resnet import BasicBlock


def _settled(channels=3):
    """A residual network whose normalisations have seen images."""
    network = build_network("resnet8", channels, 10)
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, channels, 12, 12))
    return network.eval()


def test_a_pruned_network_answers_as_if_the_filters_of_least_norm_were_zero():
    network, images = _settled(), torch.rand(4, 3, 12, 12)
    smaller = pruned(network, 0.5)
    with torch.no_grad():
        for block in (m for m in network.modules() if isinstance(m, BasicBlock)):
            norms = block.conv1.weight.abs().sum(dim=(1, 2, 3))
            least = norms.argsort()[: len(norms) // 2]
            block.bn1.weight[least] = 0
            block.bn1.bias[least] = 0

        torch.testing.assert_close(smaller(images), network(images))


def test_pruning_half_of_the_inner_filters_halves_the_work_of_the_blocks():
    network, image = _settled(), torch.rand(1, 3, 12, 12)
    # Of the stem and the linear layer: 16 filters of 3 x 3 x 3 at 12 x 12, and 64 features to 10 classes.
    rest = 16 * 27 * 144 + 640

    assert macs(pruned(network, 0.5), image) - rest == (macs(network, image) - rest) // 2


def test_pruning_leaves_the_network_itself_as_it_was():
    network, images = _settled(), torch.rand(2, 3, 12, 12)
    before = network(images)

    pruned(network, 0.3)

    assert torch.equal(network(images), before)


def test_a_pruned_network_is_found_again_in_its_weights():
    network, images = _settled(), torch.rand(2, 3, 12, 12)
    smaller = pruned(network, 0.4)

    again = like(build_network("resnet8", 3, 10), smaller.state_dict()).eval()

    assert torch.equal(again(images), smaller(images))
