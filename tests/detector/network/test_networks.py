import pytest
import torch

from detector.errors import RequestError
from detector.network.decouple import decouple
from detector.network.networks import NETWORKS, build_network
from detector.network.normalise import Normalise
from detector.torchvision_ops import import_torchvision


@pytest.mark.parametrize("name", NETWORKS)
def test_any_channels_and_classes_and_sizes(name):
    network = build_network(name, 2, 7).eval()

    with torch.inference_mode():
        assert network(torch.rand(3, 2, 36, 20)).shape == (3, 7)


larger = pytest.mark.parametrize("name", ["vggnet", "googlenet", "resnet18"])


@larger
def test_a_step_lowers_the_loss_of_the_larger_networks(name):
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    network = build_network(name, 3, 4).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)

    before = torch.nn.functional.cross_entropy(network(images), labels)
    before.backward()
    optimizer.step()

    assert torch.nn.functional.cross_entropy(network(images), labels) < before


@larger
def test_every_weight_and_gate_of_the_larger_networks_learns_when_decoupled(name):
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    network = decouple(build_network(name, 3, 4), 0.7).train()

    torch.nn.functional.cross_entropy(network(images), labels).backward()

    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in network.parameters())
    assert all(gate.excite.weight.grad.abs().sum() > 0 for gate in network.gates())


def test_resnet18_is_torchvisions_network_behind_normalised_pixels():
    theirs = import_torchvision("models").resnet18(num_classes=6).eval()
    ours = build_network("resnet18", 3, 6).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    images = torch.rand(2, 3, 64, 64)

    assert not unexpected
    assert missing == ["normalise.mean", "normalise.std"]
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs((images - 0.5) / 0.25))


def test_an_unknown_network_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match="expected a network of .*resnet20, .*; got 'lenet'"):
        build_network("lenet", 3, 10)


def test_fewer_than_two_classes_are_refused():
    with pytest.raises(RequestError, match="2 classes, got 3 and 1"):
        build_network("resnet8", 3, 1)


def test_normalised_pixels_have_the_statistics_that_were_set():
    layer = Normalise(2)
    layer.set_statistics(torch.tensor([0.2, 0.4]), torch.tensor([0.1, 0.2]))

    result = layer(torch.tensor([0.3, 0.8]).reshape(1, 2, 1, 1))

    torch.testing.assert_close(result.flatten(), torch.tensor([1.0, 2.0]))


@pytest.fixture
def user_package(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def build(channels, classes):\n"
        "    parts = [nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)]\n"
        "    return nn.Sequential(*parts)\n"
        "def number(channels, classes):\n"
        "    return 5\n"
        "def broken(channels, classes):\n"
        "    raise KeyError('nothing here')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])


def test_a_users_own_network_is_built_by_its_function_where_that_is_trusted(user_package):
    network = build_network("my_models:build", 2, 5, trusted="my_models:build")

    assert network(torch.rand(3, 2, 8, 8)).shape == (3, 5)


@pytest.mark.parametrize(
    ("name", "trusted", "message"),
    [
        ("my_models:build", None, "expected leave to run the code of my_models:build, .* give --trust my_models:build"),
        ("my_models:build", "my_models:number", "expected leave to run the code of my_models:build"),
        ("my_models:number", "my_models:number", "expected a torch module from my_models:number, got int"),
        ("my_models:broken", "my_models:broken", "got KeyError: 'nothing here'"),
        ("my_models:absent", "my_models:absent", "got AttributeError"),
        ("no_such_package:build", "no_such_package:build", "got ModuleNotFoundError"),
    ],
)
def test_functions_that_build_no_network_are_refused_in_one_line(user_package, name, trusted, message):
    with pytest.raises(RequestError, match=message) as caught:
        build_network(name, 3, 10, trusted)
    assert "\n" not in str(caught.value)
