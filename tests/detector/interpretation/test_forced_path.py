import pytest
import torch

from detector.interpretation.forced_path import forced_path
from detector.network.decouple import GatedNet, decouple
from detector.network.folding import fold_normalisation
from detector.network.networks import build_network


@pytest.fixture(params=["as trained", "folded"])
def network(request: pytest.FixtureRequest) -> GatedNet:
    made = decouple(build_network("resnet8", 1, 10), 0.5)
    for gate in made.gates():  # gates that say different things of different images
        torch.nn.init.normal_(gate.excite.weight, std=3)
        torch.nn.init.zeros_(gate.normalise.bias)
    return fold_normalisation(made) if request.param == "folded" else made


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 1, 8, 8)


def path_of(network: GatedNet, images: torch.Tensor) -> torch.Tensor:
    _, readings = network.trace(images)
    return torch.cat([reading.mask for reading in readings.values()], dim=1)


def test_the_own_path_forced_changes_nothing(network, images):
    with torch.inference_mode():
        plain, own = network(images), path_of(network, images)
        with forced_path(network, own):
            forced = network(images)
    torch.testing.assert_close(forced, plain)


def test_what_is_left_to_the_gates_is_theirs(network, images):
    width = sum(network.layers.values())
    with torch.inference_mode():
        plain = network(images)
        with forced_path(network, torch.full((1, width), torch.nan)):
            torch.testing.assert_close(network(images), plain)


def test_filters_are_in_the_states_that_were_asked_for(network, images):
    width = sum(network.layers.values())
    states = (torch.arange(6 * width).view(6, width) % 3 == 0).float()
    with torch.inference_mode(), forced_path(network, states):
        torch.testing.assert_close(path_of(network, images), states)


def test_closing_all_filters_leaves_the_image_unseen_by_the_gated_layers(network, images):
    width = sum(network.layers.values())
    states = torch.zeros(1, width)
    with torch.inference_mode(), forced_path(network, states):
        _, readings = network.trace(images)
    assert all((reading.mask == 0).all() for reading in readings.values())


def test_an_opened_filter_gives_what_it_would_have_given(network, images):
    """All open is the network before it was decoupled."""
    width = sum(network.layers.values())
    with torch.inference_mode():
        with forced_path(network, torch.ones(1, width)):
            opened = network(images)
        for gate in network.gates():
            gate.excite.weight.zero_()
            (gate.normalise if hasattr(gate.normalise, "bias") else gate.excite).bias.fill_(1.0)
        torch.testing.assert_close(network(images), opened)


def test_afterwards_the_gates_are_in_charge_again(network, images):
    width = sum(network.layers.values())
    with torch.inference_mode():
        plain = network(images)
        with pytest.raises(KeyboardInterrupt), forced_path(network, torch.zeros(1, width)):
            raise KeyboardInterrupt
        torch.testing.assert_close(network(images), plain)
