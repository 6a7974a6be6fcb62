"""Fine-tunes a decoupled network on images that were made to evade its path.

An attacker who knows the detector moves the gate logits of an attacked image to where clean images have them. The
network is trained so that this costs the misclassification: half of each batch is attacked plainly, half is drawn
towards another image of the batch, its label and its gate logits at once (path matching): one whose label is the
likeliest wrong one in the batch. The loss is the cross-entropy on what the attacks made (Madry et al., "Towards Deep
Learning Models Resistant to Adversarial Attacks", ICLR 2018) or that of TRADES (Zhang et al., "Theoretically Principled
Trade-off between Robustness and Accuracy", ICML 2019): cross-entropy on clean images, and the divergence of the answer
for the attacked image from that for the clean one. Gates alone may be trained, with the convolutions as they are, or
the whole network; either costs accuracy on clean images, which is stated.
"""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.craft import craft
from attacks.recipes import RECIPES
from attacks.selection import rightly_classified
from detector.batches import best_device, device_of, to_tensor
from detector.bundle import Bundle, add_network
from detector.datasets import ImageSet, Splits
from detector.errors import RequestError
from detector.model_card import write_card
from detector.network.decouple import GatedNet
from detector.network.gates import logits_of
from detector.network.losses import sparsity_share
from detector.network.schedule import Schedule
from detector.network.training import Listener, accuracy, train_epochs
from detector.stages import check_classes, check_enough, check_fits, check_new, checkpointed, data_facts

Part = Literal["gates", "network"]
CHECKPOINTS = "checkpoint-hardening"
JUDGED_IMAGES = 300


@dataclass(frozen=True, slots=True)
class Hardening:
    """How the images are made that a network is hardened by.

    Attributes:
        part: what is trained: the gates alone, or the whole network.
        budget: L-inf, pixels in [0, 1].
        steps: of each attack; see `step_length`.
        weight: of the distance between gate logits beside the cross-entropy.
        trade: TRADES' weight of the divergence beside the cross-entropy on clean images; more of it costs more
            accuracy. 0 trains on the attacked images alone instead, in three quarters of the time.
    """

    part: Part = "network"
    budget: float = 8 / 255
    steps: int = 2
    weight: float = 0.1
    trade: float = 0.0

    @property
    def step_length(self) -> float:
        """Pixels in [0, 1]: a quarter of the budget, or more of it where there are few steps (Wong et al. 2020)."""
        return self.budget * max(0.25, 1.25 / self.steps)

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise RequestError(f"expected {' or '.join(get_args(Part))} to harden, got {self.part!r}")
        if not 0 < self.budget <= 1 or self.steps < 1 or self.weight < 0 or self.trade < 0:
            raise RequestError(f"expected a budget in (0, 1], a step and no negative weights, got {self}")


@dataclass(frozen=True, slots=True)
class HardenedFigures:
    """What hardening gave and took; each in [0, 1].

    Attributes:
        accuracy_before: share of right labels on all test images.
        accuracy: the same afterwards.
        robust_before: share of validation images that PGD of 10 steps does not make the network misread, wrong ones
            counted as misread.
        robust: the same afterwards.
        images: how many test images.
        attacked: how many validation images.
    """

    accuracy_before: float
    accuracy: float
    robust_before: float
    robust: float
    images: int
    attacked: int


def harden(
    bundle: Bundle, splits: Splits, hardening: Hardening, schedule: Schedule, folder: Path, listen: Listener,
    command: str = "",
) -> tuple[Bundle, HardenedFigures]:  # fmt: skip
    """Harden the bundle's network into `folder`; the same call goes on with an interrupted run.

    Its detector is left out: paths have changed. Attack the new network, and fit anew.

    Args:
        bundle: with a decoupled network.
        splits: the data that it was trained on.
        hardening: what is trained, and by which images.
        schedule: how long and how fast.
        folder: the new bundle.
        listen: called after every step.
        command: what the user typed, for the model card.

    Raises:
        ArtifactError: `folder` holds a bundle, or `bundle` has no decoupled network or, compacted, no backbone.
        DataError: the data does not fit, or a class has no training images.
        RequestError: the schedule cannot train, or there is too little data for one step.
        TrainingError: the loss is not finite, the checkpoint is of another run, or it cannot be written.
    """
    check_fits(bundle, splits.train)
    check_new(folder, CHECKPOINTS)
    check_enough(splits.train, schedule)
    check_classes(splits.train)
    backbone = bundle.backbone_digest
    network, gates = bundle.network().to(best_device()), bundle.manifest.gates
    assert gates is not None
    before, judged = copy.deepcopy(network), splits.validation.first(JUDGED_IMAGES)
    trained = [w for gate in network.gates() for w in gate.parameters()] if hardening.part == "gates" else None
    if trained is not None:
        network.requires_grad_(False)
        for weights in trained:
            weights.requires_grad_(True)

    def loss(images: Tensor, labels: Tensor, _progress: float) -> Tensor:
        network.eval()
        attacked = evading(network, images, labels, hardening)
        # Gates alone are trained in the network as it is used: batch normalisation keeps what it learnt.
        network.train(trained is None)
        network.set_noise(0)
        if hardening.trade:
            both, readings = network.trace(torch.cat([images, attacked]))
            clean, other = (F.log_softmax(part, 1) for part in both.chunk(2))
            divergence = F.kl_div(other, clean, reduction="batchmean", log_target=True)
            total = F.nll_loss(clean, labels) + hardening.trade * divergence
        else:
            answers, readings = network.trace(attacked)
            total = F.cross_entropy(answers, labels)
        return total + sparsity_share(readings, gates.keep)

    def measure() -> Mapping[str, float]:
        return {"accuracy": accuracy(network, splits.validation), "robust": robust_accuracy(network, judged, hardening)}

    run = {
        "stage": "hardening", "backbone": backbone, "network": bundle.network_digest, "hardening": asdict(hardening),
        "schedule": asdict(schedule), **data_facts(splits.train),
    }  # fmt: skip
    checkpoints = folder / CHECKPOINTS
    with checkpointed(checkpoints):
        train_epochs(
            network, loss, splits, schedule, checkpoints, run, listen, measure,
            lambda _, figures: figures["accuracy"] + figures["robust"],
        )  # fmt: skip
    network.requires_grad_(True)
    figures = HardenedFigures(
        accuracy(before, splits.held_out), accuracy(network, splits.held_out),
        robust_accuracy(before, judged, hardening), robust_accuracy(network, judged, hardening),
        len(splits.held_out), len(judged),
    )  # fmt: skip
    training = {
        "command": command, "schedule": asdict(schedule), "hardening": asdict(hardening), "figures": asdict(figures),
        "hardened_from": bundle.network_digest, **data_facts(splits.train),
    }  # fmt: skip
    grown = add_network(bundle, folder, gates, network.cpu(), training)
    write_card(grown)
    shutil.rmtree(checkpoints)
    return grown, figures


def evading(network: GatedNet, images: Tensor, labels: Tensor, hardening: Hardening) -> Tensor:
    """Versions of `images` in [0, 1] within the budget: of the first half misread, of the second another's path.

    That other image is one of the batch's, of the label that the network finds likeliest among the wrong ones there.

    Args:
        network: in evaluation mode; its weights' need for gradients is as before afterwards.
        images: in [0, 1], `(batch, channels, height, width)`.
        labels: right labels, `(batch,)`.
        hardening: budget, steps and weight.
    """
    wanting = [weights for weights in network.parameters() if weights.requires_grad]
    for weights in wanting:
        weights.requires_grad_(False)
    with torch.no_grad():
        answers, paths = _gate_logits(network, images)
        # Those of one label are equally likely: chance decides among them.
        likely = answers.float()[:, labels] + 1e-3 * torch.rand(len(images), len(images), device=images.device)
        other = likely.masked_fill(labels[:, None] == labels, -torch.inf).argmax(dim=1)
        guides = paths[other]
    drawn = (torch.arange(len(images), device=images.device) >= len(images) // 2) & (labels != labels[other])
    points = (images + hardening.budget * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    for _ in range(hardening.steps):
        points.requires_grad_(True)
        with torch.enable_grad():
            logits, gates = _gate_logits(network, points)
            away = F.cross_entropy(logits, labels, reduction="none")
            apart = (gates - guides).square().mean(dim=1)
            towards = -F.cross_entropy(logits, labels[other], reduction="none") - hardening.weight * apart
            (slope,) = torch.autograd.grad(torch.where(drawn, towards, away).sum(), points)
        stepped = points.detach() + hardening.step_length * slope.sign()
        points = torch.min(torch.max(stepped, images - hardening.budget), images + hardening.budget).clamp(0, 1)
    for weights in wanting:
        weights.requires_grad_(True)
    return points.detach()


def robust_accuracy(network: GatedNet, images: ImageSet, hardening: Hardening, seed: int = 0) -> float:
    """Share of `images` that PGD of 10 steps within the budget does not make the network misread, in [0, 1]."""
    right = images.subset(rightly_classified(network, images))
    if len(right) == 0:
        return 0.0
    pixels = to_tensor(right.pixels(slice(None)), device_of(network))
    labels = torch.from_numpy(right.labels).to(pixels.device)
    recipe = replace(RECIPES["pgd"], budget=hardening.budget)
    crafted = craft(recipe, network, pixels, labels, seed, right.ids)
    return float((~crafted.fooled).sum() / len(images))


def _gate_logits(network: GatedNet, images: Tensor) -> tuple[Tensor, Tensor]:
    logits, readings = network.trace(images)
    return logits, logits_of(readings)
