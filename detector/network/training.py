"""Epochs of a backbone and of a decoupled network: seeded, resumable, with the same loop for both."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.batches import batches, device_of, to_tensor
from detector.datasets import ImageSet, Indices, Splits
from detector.errors import TrainingError
from detector.images import Pixels
from detector.network.checkpoint import Chosen, load_checkpoint, restore, save_checkpoint
from detector.network.decouple import GatedNet
from detector.network.losses import (
    LabelHeads,
    Objective,
    alignment,
    distillation,
    input_information,
    label_information,
    redundancy,
    sparsity_counted,
    sparsity_share,
)
from detector.network.normalise import Normalise
from detector.network.schedule import Schedule

BatchLoss = Callable[[Tensor, Tensor, float], Tensor]
Figures = Mapping[str, float]
# How far the share of open filters may lie from what was asked for.
KEEP_TOLERANCE = 0.02
# Share of the training, before the network settles, after which the gates see no noise any more.
NOISE_ENDS = 0.8


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training run stands; given to a listener after every step.

    Attributes:
        epoch: the epoch in work, from 0 (the number of epochs once all are done).
        step: steps done in all.
        steps: steps of the whole run.
        loss: of the last step; NaN at the start of a resumed run.
        figures: measured on the validation images after the last whole epoch, by name.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    figures: Figures


Listener = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Team:
    """Several processes that train one network: each does its share of every batch, and gradients are averaged.

    Attributes:
        rank: which of them this one is; the first one measures, and writes the checkpoint.
        size: how many they are.
        joined: makes of the network one whose gradients are averaged over the team.
    """

    rank: int = 0
    size: int = 1
    joined: Callable[[nn.Module], nn.Module] = lambda network: network


ALONE = Team()


def train_backbone(
    network: nn.Module, splits: Splits, schedule: Schedule, folder: Path, run: Mapping[str, object], listen: Listener,
    team: Team = ALONE,
) -> None:  # fmt: skip
    """Train a plain network in place; resumes from the checkpoint in `folder`.

    The weights that remain are those of the epoch that did best on the validation images.

    Args:
        network: images in [0, 1] -> logits; a first layer `normalise` learns the pixels' statistics.
        splits: trained on `train`, chosen on `validation`.
        schedule: how long and how fast.
        folder: where the checkpoint lies.
        run: names of network and data; with the schedule they tell this run from others.
        listen: called after every step.
        team: who trains. A checkpoint serves a team of any size; batch normalisation sees its own share of a batch
            only, so that the weights differ with the size.

    Raises:
        TrainingError: the loss is not finite, or the checkpoint is of another run.
    """
    normalise = getattr(network, "normalise", None)
    if isinstance(normalise, Normalise):
        normalise.set_statistics(*pixel_statistics(splits.train))

    joined = team.joined(network)

    def loss(images: Tensor, labels: Tensor, _progress: float) -> Tensor:
        return F.cross_entropy(joined(images), labels)

    train_epochs(
        network, loss, splits, schedule, folder, {**run, "schedule": asdict(schedule)}, listen,
        lambda: {"accuracy": accuracy(network, splits.validation)}, lambda _, figures: figures["accuracy"], team,
    )  # fmt: skip


def train_decoupled(
    network: GatedNet,
    backbone: nn.Module,
    splits: Splits,
    objective: Objective,
    keep: float,
    schedule: Schedule,
    folder: Path,
    run: Mapping[str, object],
    listen: Listener,
    behind: float = 0.0,
) -> None:
    """Train a decoupled network in place; resumes from the checkpoint in `folder`.

    The share of open filters starts above `keep` and tightens to it over the first half; the training noise falls to
    nothing over the first 80 %, so that the network at the end of training is the one that is used. Both are ours, not
    the paper's; an objective can switch them off. Where the schedule has a time to settle, these are shares of the time
    before it; in it the gates' weights are held, and only the label and the backbone's answer count. Of the epochs
    without noise, the one that does best on the validation images remains, among those whose share of open filters is
    within `KEEP_TOLERANCE` of `keep`.

    Args:
        network: from `decouple(backbone)`.
        backbone: the plain network, the teacher of the distillation term.
        splits: trained on `train`, chosen on `validation`.
        objective: the weights of the loss terms.
        keep: share of filters to keep open, in (0, 1].
        schedule: how long and how fast.
        folder: where the checkpoint lies.
        run: names of network and data; with objective and schedule they tell this run from others.
        listen: called after every step.
        behind: share of such a training, in [0, 1), that the network has behind it: noise and share of open filters
            begin as they are there.

    Raises:
        TrainingError: the loss is not finite, or the checkpoint is of another run.
    """
    backbone.eval()
    heads = LabelHeads(network.layers, len(splits.train.class_names)).to(device_of(network))
    trained = nn.ModuleDict({"network": network, "heads": heads}) if objective.label_information else network

    def progress_at(done: float) -> float:
        """Of what the gates learn; from 1 on the network settles."""
        return (behind + (1 - behind) * done) / (1 - schedule.settling)

    def loss(images: Tensor, labels: Tensor, done: float) -> Tensor:
        progress = progress_at(done)
        network.hold_gates(progress >= 1)
        noise = max(0.0, 1.0 - progress / NOISE_ENDS) if objective.annealed else 1.0
        target = 0.0 if objective.zero_target else target_share(keep, progress)
        network.set_noise(noise)
        logits, readings = network.trace(images)
        total = (1 - objective.distillation) * F.cross_entropy(logits, labels)
        if objective.distillation:
            with torch.no_grad():
                teacher_logits = backbone(images)
            total = total + objective.distillation * distillation(logits, teacher_logits)
        if progress >= 1:
            return total
        if objective.label_information:
            total = total + objective.label_information * label_information(heads(readings), labels)
        if objective.input_information:
            total = total - objective.input_information * input_information(readings, max(noise, 0.25))
        if objective.redundancy:
            total = total + objective.redundancy * redundancy(readings, max(noise, 0.25))
        if objective.alignment:
            total = total + objective.alignment * alignment(readings)
        if objective.sparsity:
            distance = sparsity_counted if objective.counted else sparsity_share
            total = total + objective.sparsity * distance(readings, target)
        return total

    def may_be_chosen(done: float, figures: Figures) -> float | None:
        if progress_at(done) < NOISE_ENDS or abs(figures["keep_ratio"] - keep) > KEEP_TOLERANCE:
            return None
        return figures["accuracy"]

    identity = {**run, "keep": keep, "objective": asdict(objective), "schedule": asdict(schedule)}
    train_epochs(
        trained, loss, splits, schedule, folder, identity, listen,
        lambda: asdict(measure_gates(network, splits.validation)), may_be_chosen,
    )  # fmt: skip
    network.hold_gates(False)


def target_share(keep: float, progress: float) -> float:
    """The share to keep open at `progress` in [0, 1]: half-way from `keep` to 1 at first, `keep` from 0.5 on."""
    return keep + (1 - keep) * 0.5 * max(0.0, 1.0 - 2 * progress)


@dataclass(frozen=True, slots=True)
class GateFigures:
    """How a decoupled network does on a set of images at test time, each in [0, 1].

    Attributes:
        accuracy: share of images whose label is right.
        keep_ratio: mean share of open filters.
        input_dependent: share of filters open for 1 % to 99 % of the images.
    """

    accuracy: float
    keep_ratio: float
    input_dependent: float


def measure_gates(network: GatedNet, images: ImageSet, batch: int = 500) -> GateFigures:
    """Accuracy and gate statistics of `network` on `images`, in evaluation mode."""
    right, opened = 0, torch.zeros(sum(network.layers.values()))
    network.eval()
    with torch.inference_mode():
        for positions, pixels in batches(images, batch, device_of(network)):
            logits, readings = network.trace(pixels)
            right += int((logits.argmax(dim=1).cpu() == torch.from_numpy(images.labels[positions])).sum())
            opened += torch.cat([reading.mask for reading in readings.values()], dim=1).float().sum(dim=0).cpu()
    share = opened / len(images)
    dependent = (share >= 0.01) & (share <= 0.99)
    return GateFigures(right / len(images), float(share.mean()), float(dependent.float().mean()))


def accuracy(network: nn.Module, images: ImageSet, batch: int = 500) -> float:
    """Share of `images` whose label `network` gets right, in evaluation mode, in [0, 1]."""
    network.eval()
    right = 0
    with torch.inference_mode():
        for positions, pixels in batches(images, batch, device_of(network)):
            right += int((network(pixels).argmax(dim=1).cpu() == torch.from_numpy(images.labels[positions])).sum())
    return right / len(images)


def pixel_statistics(images: ImageSet, sample: int = 5000) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels in [0, 1], each `(channels,)`, over the first `sample` images."""
    pixels = images.pixels(slice(0, sample)).astype(np.float64) / 255
    return (
        torch.tensor(pixels.mean(axis=(0, 1, 2)), dtype=torch.float32),
        torch.tensor(pixels.std(axis=(0, 1, 2)), dtype=torch.float32),
    )


def train_epochs(
    trained: nn.Module,
    loss_of: BatchLoss,
    splits: Splits,
    schedule: Schedule,
    folder: Path,
    run: Mapping[str, object],
    listen: Listener,
    measure: Callable[[], Figures],
    score: Callable[[float, Figures], float | None],
    team: Team = ALONE,
) -> None:
    """The loop of every training; ends with `trained` in evaluation mode, with the weights of the best epoch.

    Args:
        trained: what is trained, in place; weights that need no gradient stay as they are.
        loss_of: images, labels and the share of the training that is done -> loss.
        splits: trained on `train`.
        schedule: how long and how fast.
        folder: where the checkpoint lies.
        run: tells this run from others.
        listen: called after every step.
        measure: gives the figures of an epoch.
        score: the share of the training that is done, and the epoch's figures -> what is made large; None for an epoch
            that may not be chosen. Where none may, the last epoch's weights remain.
        team: who trains; what remains is with its first.

    Raises:
        TrainingError: the loss is not finite, or the checkpoint is of another run.
    """
    images, device = splits.train, device_of(trained)
    optimizer = torch.optim.SGD(
        trained.parameters(), lr=schedule.learning_rate, momentum=schedule.momentum, nesterov=True,
        weight_decay=schedule.weight_decay,
    )  # fmt: skip
    steps_an_epoch = max(1, len(images) // schedule.batch)
    steps = steps_an_epoch * schedule.epochs
    checkpoint = load_checkpoint(folder, run)
    finished, chosen = 0, None
    figures: Figures = {}
    if checkpoint is not None:
        restore(checkpoint, trained, optimizer)
        finished, chosen = checkpoint.epoch, checkpoint.chosen
        figures = measure()
        listen(Progress(finished, finished * steps_an_epoch, steps, math.nan, figures))
    for epoch in range(finished, schedule.epochs):
        # Every random draw of an epoch follows from the seed and the epoch, so that a resumed run repeats none.
        torch.manual_seed(schedule.seed * 10_007 + epoch)
        chooser = np.random.default_rng((schedule.seed, epoch))
        order = chooser.permutation(len(images))
        trained.train()
        for index in range(steps_an_epoch):
            step = epoch * steps_an_epoch + index
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step / steps)
            whole = order[index * schedule.batch : (index + 1) * schedule.batch]
            shifts = _shifts(len(whole), images.spec.height, schedule, chooser)
            own = slice(team.rank, None, team.size)
            positions = whole[own]
            pixels = _augment(images.pixels(positions), schedule, shifts.at(own))
            labels = torch.from_numpy(images.labels[positions]).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=_has_fast_bf16(device)):
                loss = loss_of(to_tensor(pixels, device), labels, step / steps)
                if team.size > 1:  # each share counts by its images
                    loss = loss * (len(positions) * team.size / len(whole))
            if not torch.isfinite(loss):
                raise TrainingError(_diverged(f"loss, got {loss.item()} at step {step + 1} of {steps}", epoch, folder))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            listen(Progress(epoch, step + 1, steps, loss.item(), figures))
        if not all(torch.isfinite(value).all() for value in trained.parameters()):
            raise TrainingError(_diverged(f"weights, got others at the end of epoch {epoch + 1}", epoch, folder))
        if team.rank:
            continue
        figures = measure()
        reached = score((epoch + 1) / schedule.epochs, figures)
        if reached is not None and (chosen is None or reached >= chosen.score):
            chosen = Chosen(reached, {name: value.clone() for name, value in trained.state_dict().items()})
        save_checkpoint(folder, epoch + 1, run, trained, optimizer, chosen)
        listen(Progress(epoch + 1, (epoch + 1) * steps_an_epoch, steps, loss.item(), figures))
    if chosen is not None:
        trained.load_state_dict(chosen.weights)
    trained.eval()


def _diverged(what: str, epoch: int, folder: Path) -> str:
    kept = f"the checkpoint of epoch {epoch} in {folder} is whole" if epoch else "no epoch was finished"
    return f"expected a finite {what}; {kept}; try a smaller learning rate with another --out"


@dataclass(frozen=True, slots=True)
class _Shifts:
    """How the images of a batch are moved and mirrored, each `(images,)`."""

    rows: Indices
    columns: Indices
    mirrored: npt.NDArray[np.bool_]

    def at(self, own: slice) -> "_Shifts":
        return _Shifts(self.rows[own], self.columns[own], self.mirrored[own])


def _shifts(count: int, height: int, schedule: Schedule, chooser: np.random.Generator) -> _Shifts:
    """Each image is shifted at random over a black border, and half of them are mirrored."""
    rows, columns = chooser.integers(0, 2 * int(schedule.shift * height) + 1, (2, count))
    mirrored = chooser.random(count) < 0.5 if schedule.flip else np.zeros(count, bool)
    return _Shifts(rows, columns, mirrored)


def _augment(pixels: Pixels, schedule: Schedule, shifts: _Shifts) -> Pixels:
    count, height, width, _ = pixels.shape
    border = int(schedule.shift * height)
    padded = np.pad(pixels, ((0, 0), (border, border), (border, border), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    shifted: Pixels = np.moveaxis(windows[np.arange(count), shifts.rows, shifts.columns], 1, 3)
    shifted[shifts.mirrored] = shifted[shifts.mirrored, :, ::-1]
    return shifted


def _has_fast_bf16(device: torch.device) -> bool:
    """bf16 is only worth it where the hardware multiplies it; elsewhere a CPU is many times slower with it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
