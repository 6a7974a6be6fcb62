import numpy as np
import pytest
import torch

from detector.interpretation.correction import Corrector
from detector.interpretation.forced_path import forced_path
from detector.interpretation.usual_paths import UsualPaths, UsualPathsBuilder
from detector.network.decouple import GatedNet, decouple
from detector.network.networks import build_network
from detector.paths.path_encoding import PathEncoding


@pytest.fixture
def network() -> GatedNet:
    return decouple(build_network("resnet8", 1, 4), 0.7)


@pytest.fixture
def usual(network) -> UsualPaths:
    """Each class with a usual path of its own, drawn at random."""
    builder = UsualPathsBuilder(network.layers, 4)
    bits = np.random.default_rng(0).random((4, sum(network.layers.values()))) < 0.6
    builder.add(PathEncoding(bits, network.layers), np.arange(4), np.arange(4))
    return builder.built()


def own_share(network: GatedNet, usual: UsualPaths, image: torch.Tensor, label: int) -> float:
    """How likely a class is on its own usual path."""
    states = torch.from_numpy(usual.usual()[[label]].astype(np.float32))
    with torch.inference_mode(), forced_path(network, states):
        return float(network(image[None]).softmax(dim=1)[0, label])


def test_the_class_most_at_home_on_its_usual_path_is_restored(network, usual):
    images = torch.rand(8, 1, 8, 8)
    logits = network(images).detach().numpy()
    restored = Corrector(network, usual, candidates=4).restored(images, logits)
    for image, label in zip(images, restored, strict=True):
        shares = [own_share(network, usual, image, other) for other in range(4)]
        assert int(np.argmax(shares)) == label


def test_only_the_likeliest_classes_are_tried(network, usual):
    images = torch.rand(8, 1, 8, 8)
    logits = np.tile(np.array([0.0, 3.0, 1.0, 2.0], np.float32), (8, 1))
    assert set(Corrector(network, usual, candidates=2).restored(images, logits)) <= {1, 3}
    assert Corrector(network, usual, candidates=1).restored(images, logits).tolist() == [1] * 8


def test_an_image_is_restored_alone_as_in_company(network, usual):
    images = torch.rand(5, 1, 8, 8)
    logits = network(images).detach().numpy()
    corrector = Corrector(network, usual)
    alone = [int(corrector.restored(images[[place]], logits[[place]])[0]) for place in range(5)]
    assert corrector.restored(images, logits).tolist() == alone


def test_nothing_to_restore_is_no_work(network, usual):
    restored = Corrector(network, usual).restored(torch.empty(0, 1, 8, 8), np.empty((0, 4), np.float32))
    assert restored.shape == (0,)
