import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from detector.errors import RequestError
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.torchvision_ops import import_torchvision


def open_all(network):
    for gate in network.gates():
        nn.init.zeros_(gate.normalise.weight)
        nn.init.constant_(gate.normalise.bias, 5.0)
    return network


def test_networks_in_other_threads_go_on_while_one_is_traced():
    serving = decouple(build_network("resnet8", 1, 10)).eval()
    images, over, errors = torch.rand(2, 1, 8, 8), threading.Event(), []
    expected = serving(images)

    def serve():
        while not over.is_set():
            try:
                torch.testing.assert_close(serving(images), expected)
            except Exception as error:
                errors.append(error)
                return

    def trace():
        for _ in range(10):
            made.append(len(decouple(build_network("resnet8", 1, 10)).layers))

    made = []
    threads = [threading.Thread(target=work) for work in (serve, trace, trace)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    over.set()
    threads[0].join()

    assert errors == []
    assert made == [len(serving.layers)] * 20


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(["resnet8", "resnet20"]), channels=st.integers(1, 4), classes=st.integers(2, 12))
def test_with_all_gates_open_the_output_is_the_backbones(name, channels, classes):
    backbone = build_network(name, channels, classes).eval()
    network = open_all(decouple(backbone)).eval()
    images = torch.rand(3, channels, 16, 16)

    torch.testing.assert_close(network(images), backbone(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("resnet18", 19), ("resnet50", 52), ("vgg16_bn", 12), ("googlenet", 56), ("mobilenet_v3_small", 22),
        ("densenet121", 58),
    ],
)  # fmt: skip
def test_torchvisions_networks_can_be_decoupled_and_keep_their_output(name, gates):
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    backbone = getattr(import_torchvision("models"), name)(num_classes=10, **extra).eval()
    network = open_all(decouple(backbone)).eval()
    images = torch.rand(2, 3, 64, 64)

    assert len(network.layers) == gates
    with torch.inference_mode():
        torch.testing.assert_close(network(images), backbone(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "gates", "length"),
    [("resnet20", 18, 672), ("resnet56", 54, 2016), ("vggnet", 15, 5440), ("googlenet", 63, 7712)],
)
def test_the_published_networks_have_paths_of_their_published_length_and_keep_their_output(name, gates, length):
    backbone = build_network(name, 3, 10).eval()
    network = open_all(decouple(backbone)).eval()
    images = torch.rand(2, 3, 32, 32)

    assert sum(network.layers.values()) == length
    assert len(network.layers) == len(network.gates()) == gates
    with torch.inference_mode():
        torch.testing.assert_close(network(images), backbone(images), atol=1e-5, rtol=1e-5)


def test_trace_gives_the_same_logits_and_a_reading_of_every_gate():
    network = decouple(build_network("resnet8", 1, 10)).eval()
    images = torch.rand(2, 1, 12, 12)

    logits, readings = network.trace(images)

    assert torch.equal(logits, network(images))
    assert {name: reading.mask.shape[1] for name, reading in readings.items()} == network.layers
    assert all(reading.mask.shape[0] == 2 and reading.response is None for reading in readings.values())


def test_each_image_is_labelled_alone():
    network = decouple(build_network("resnet8", 1, 10)).eval()
    images = torch.rand(4, 1, 12, 12)

    alone = torch.cat([network(image[None]) for image in images])

    torch.testing.assert_close(network(images), alone, atol=1e-4, rtol=1e-4)


def test_gradients_reach_gates_and_backbone_in_training():
    network = decouple(build_network("resnet8", 1, 10)).train()

    network(torch.rand(8, 1, 12, 12)).square().sum().backward()

    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(gate.excite.weight.grad.abs().sum() > 0 for gate in network.gates())


def test_frozen_gates_change_the_gradient_and_not_the_answer():
    network = decouple(build_network("resnet8", 1, 10)).eval()
    images = torch.rand(2, 1, 12, 12, requires_grad=True)
    seen = torch.autograd.grad(network(images).square().sum(), images)[0]

    with network.frozen_gates():
        logits = network(images)
        overlooked = torch.autograd.grad(logits.square().sum(), images)[0]

    assert torch.equal(logits, network(images))
    assert not torch.allclose(seen, overlooked)


def test_the_backbone_itself_is_left_as_it_was():
    backbone = build_network("resnet8", 1, 10)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}

    network = decouple(backbone)
    network.train()(torch.rand(4, 1, 12, 12))

    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_grouped_convolutions_and_the_stem_stay_ungated():
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip

    assert decouple(backbone).layers == {"6": 16}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.again = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.once = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, images):
        return self.once(self.again(self.again(self.stem(images)))).mean(dim=(2, 3))


def test_a_convolution_that_is_called_twice_stays_ungated():
    assert decouple(Twice()).layers == {"once.0": 6}


class Unpredictable(nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


@pytest.mark.parametrize(
    ("backbone", "keep", "message"),
    [
        (nn.Linear(4, 2), 0.7, "expected an ungrouped convolution"),
        (Unpredictable(), 0.7, "expected a network that torch.fx can trace, or names of its .* got Unpredictable"),
        (nn.Linear(4, 2), 0.0, r"expected a share of filters to keep in \(0, 1\], got 0.0"),
        (nn.Linear(4, 2), 1.5, "got 1.5"),
    ],
)
def test_what_cannot_be_decoupled_is_refused_in_one_line(backbone, keep, message):
    with pytest.raises(RequestError, match=message) as caught:
        decouple(backbone, keep)
    assert "\n" not in str(caught.value)


def test_no_gate_stands_before_an_activation_that_makes_something_of_zero():
    backbone = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
    )  # fmt: skip

    assert list(decouple(backbone).layers) == ["6"]


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        )
        self.linear = nn.Linear(4, 3)

    def forward(self, images):
        out = nn.functional.dropout(self.body(images).mean(dim=(2, 3)), 0.5, training=self.training)
        return self.linear(out)


def test_a_network_is_traced_as_it_is_used_whatever_its_mode():
    backbone = WithDropout().train()

    network = decouple(backbone)
    images = torch.rand(4, 1, 12, 12)

    assert not network.training
    assert backbone.training
    assert torch.equal(network(images), network(images))
