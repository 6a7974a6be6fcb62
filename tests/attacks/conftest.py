"""A small network that has learnt something, shared by the tests that an untrained one would not do for."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attacks.selection import rightly_classified
from detector.batches import to_tensor
from detector.bundle import Bundle
from detector.network.decouple import GatedNet
from detector.network.schedule import Schedule
from detector.stages import make_backbone, make_decoupled


@dataclass(frozen=True)
class Victim:
    """A decoupled network that knows digits, and images that it gets right."""

    bundle: Bundle
    network: GatedNet
    images: Tensor
    labels: Tensor


@pytest.fixture(scope="session")
def victim(digits, tmp_path_factory) -> Victim:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    schedule = Schedule(4, 64, 0.05, flip=False)
    bundle, _ = make_backbone("resnet8", digits, schedule, tmp_path_factory.mktemp("victim"), lambda _: None)
    bundle, _ = make_decoupled(bundle, digits, 0.7, "pathguard", schedule, bundle.folder, lambda _: None)
    network = bundle.network()
    images = digits.test.subset(rightly_classified(network, digits.test)).first(100)
    pixels = to_tensor(images.pixels(slice(None)), torch.device("cpu"))
    return Victim(bundle, network, pixels, torch.from_numpy(images.labels))
