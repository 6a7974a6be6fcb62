"""A small network made robust by adversarial training, and whether AutoAttack finds what a long PGD finds on it.

On a network without defences every attack succeeds everywhere, which tells nothing apart. This one is trained in about
a minute by fast adversarial training (Wong et al., "Fast is Better than Free", 2020: one step from a random start) on
CIFAR-10 images at half size.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.craft import craft
from attacks.recipes import RECIPES
from benchmarks.report import Row
from detector.batches import to_tensor
from detector.datasets import load_splits
from detector.network.normalise import Normalise

EPSILON = 8 / 255
STEPS = 100


@dataclass(frozen=True, slots=True)
class Length:
    """How long to train and attack.

    Attributes:
        trained: training images.
        epochs: passes over them.
        attacked: images attacked.
        restarts: of PGD.
    """

    trained: int
    epochs: int
    attacked: int
    restarts: int


FULL, QUICK = Length(20_000, 6, 500, 10), Length(3000, 2, 20, 2)


def robust_rows(data_dir: Path | None, quick: bool) -> list[Row]:
    """Robust accuracy by AutoAttack and by a PGD of 100 steps and 10 restarts, and that the first is not above."""
    length = QUICK if quick else FULL
    splits = load_splits("cifar10", data_dir)
    network = robust_network(
        _halved(splits.train.first(length.trained).pixels(slice(None))),
        torch.from_numpy(splits.train.labels[: length.trained]), length.epochs,
    )  # fmt: skip
    tried = splits.fitting.first(length.attacked)
    images, labels = _halved(tried.pixels(slice(None))), torch.from_numpy(tried.labels)
    with torch.no_grad():
        right = network(images).argmax(dim=1) == labels
    images, labels = images[right], labels[right]
    by_auto = craft(RECIPES["autoattack"], network, images, labels).fooled
    pgd = replace(RECIPES["pgd"], settings={**RECIPES["pgd"].settings, "steps": STEPS})
    by_pgd = np.zeros(len(images), bool)
    for restart in range(length.restarts):
        left = np.flatnonzero(~by_pgd)
        by_pgd[left] = craft(pgd, network, images[left], labels[left], seed=restart, ids=left).fooled
    share = len(images) / len(tried)
    auto, plain = (share * 100 * float((~fooled).mean()) for fooled in (by_auto, by_pgd))
    what = f"small robust network, {len(tried)} images"
    return [
        Row(figure=f"{what}: accuracy, %", value=100 * share),
        Row(figure=f"{what}: robust accuracy by PGD, {STEPS} steps, {length.restarts} restarts, %", value=plain),
        Row(figure=f"{what}: robust accuracy by AutoAttack, %", value=auto, bar=plain),
    ]


def robust_network(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """A network of four convolutions, trained on `images` moved by one signed step from a random start; seeded."""
    torch.manual_seed(0)
    network = _small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batches = len(images) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(128)[:batches]:
            clean, wanted = images[chosen], labels[chosen]
            clean = torch.where(torch.rand(len(clean), 1, 1, 1) < 0.5, clean.flip(3), clean)
            start = (torch.rand_like(clean) * 2 - 1) * EPSILON
            moved = (clean + start).requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), wanted), [moved])
            change = (start + 1.25 * EPSILON * gradient.sign()).clamp(-EPSILON, EPSILON)
            optimizer.zero_grad()
            F.cross_entropy(network((clean + change).clamp(0, 1)), wanted).backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def _small_network() -> nn.Module:
    widths = (3, 32, 64, 64, 128)
    layers: list[nn.Module] = [Normalise(3)]
    for place, (before, after) in enumerate(pairwise(widths)):
        stride = 1 + place % 2
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def _halved(pixels: np.ndarray) -> Tensor:
    """Images of half the height and width, in [0, 1], on the grid of 8 bits as every image is."""
    halved = F.avg_pool2d(to_tensor(pixels, torch.device("cpu")), 2)
    return (halved * 255).round() / 255
