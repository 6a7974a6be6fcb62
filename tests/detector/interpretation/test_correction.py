import numpy as np
import pytest
import torch

from detector.interpretation.correction import EVEN_P_VALUE, NATS_PER_DECADE, Corrector
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


def on_both(network: GatedNet, usual: UsualPaths, image: torch.Tensor, labels: list[int]) -> list[float]:
    """Mean log probability of two classes on the usual paths of both."""
    said = []
    for label in labels:
        states = torch.from_numpy(usual.usual()[[label]].astype(np.float32))
        with torch.inference_mode(), forced_path(network, states):
            said.append(network(image[None]).log_softmax(dim=1)[0, labels])
    return torch.stack(said).mean(dim=0).tolist()


def test_the_second_class_is_taken_where_it_leads_on_the_usual_paths_of_both_by_what_the_p_value_asks(network, usual):
    images = torch.rand(12, 1, 8, 8)
    logits = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    p_values = EVEN_P_VALUE * 10 ** np.linspace(-0.01, 0.01, 12)
    restored = Corrector(network, usual).restored(images, logits, p_values)
    changed = 0
    for image, row, p_value, label in zip(images, logits, p_values, restored, strict=True):
        first, second = np.argsort(-row)[:2].tolist()
        likelier = on_both(network, usual, image, [first, second])
        lead = NATS_PER_DECADE * np.log10(p_value / EVEN_P_VALUE)
        assert label == (second if likelier[1] - likelier[0] > lead else first)
        changed += label == second
    assert 0 < changed < 12


def test_an_image_that_is_surely_clean_keeps_its_label_and_one_that_is_surely_attacked_loses_it(network, usual):
    images = torch.rand(8, 1, 8, 8)
    logits = network(images).detach().numpy()
    first, second = np.argsort(-logits, axis=1)[:, :2].T
    corrector = Corrector(network, usual)
    assert corrector.restored(images, logits, np.full(8, 1.0)).tolist() == first.tolist()
    assert corrector.restored(images, logits, np.full(8, 1e-12)).tolist() == second.tolist()


def test_an_image_is_restored_alone_as_in_company(network, usual):
    images = torch.rand(5, 1, 8, 8)
    logits = network(images).detach().numpy()
    corrector = Corrector(network, usual)
    p_values = np.linspace(0.001, 0.05, 5)
    alone = [int(corrector.restored(images[[place]], logits[[place]], p_values[[place]])[0]) for place in range(5)]
    assert corrector.restored(images, logits, p_values).tolist() == alone


def test_nothing_to_restore_is_no_work(network, usual):
    restored = Corrector(network, usual).restored(torch.empty(0, 1, 8, 8), np.empty((0, 4), np.float32), np.empty(0))
    assert restored.shape == (0,)
