"""The first two stages of a bundle: a backbone, trained here or brought, then the decoupled network."""

import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from detector.batches import best_device, device_of, to_tensor
from detector.bundle import MANIFEST, Bundle, GatesInfo, NetworkInfo, add_network, begin_bundle
from detector.datasets import ImageSet, Splits
from detector.errors import ArtifactError, DataError, RequestError, TrainingError
from detector.files import sha256_of
from detector.model_card import write_card
from detector.network.decouple import GatedNet, decouple
from detector.network.losses import objective_named
from detector.network.macs import cost_of
from detector.network.named_gates import NamedGates
from detector.network.networks import build_network
from detector.network.schedule import Schedule
from detector.network.training import (
    KEEP_TOLERANCE,
    GateFigures,
    Listener,
    accuracy,
    measure_gates,
    target_share,
    train_backbone,
    train_decoupled,
)
from detector.network.weights import load_weights
from detector.paths.encoder import encode_set
from detector.paths.path_encoding import PathEncoding
from detector.paths.path_statistics import LayerFigures, distinct_paths, layer_figures

BACKBONE_CHECKPOINTS, NETWORK_CHECKPOINTS = "checkpoint-backbone", "checkpoint-network"
# Training images, as many of each class, whose paths the layers' probes are fitted on.
PROBE_IMAGES = 10_000
# Training images that show which convolutions of an untraceable network run.
EXAMPLE_IMAGES = 32


@dataclass(frozen=True, slots=True)
class BackboneFigures:
    """How a backbone does.

    Attributes:
        accuracy: share of all test images whose label is right, in [0, 1].
        images: how many test images.
    """

    accuracy: float
    images: int


@dataclass(frozen=True, slots=True)
class DecoupledFigures:
    """How a decoupled network does beside its backbone; all on all test images.

    Attributes:
        backbone_accuracy: share of right labels of the plain backbone, in [0, 1].
        gates: accuracy and gate statistics of the decoupled network.
        macs_left: mean multiply-accumulates of an image's own path, gates included, as a share of the backbone's.
        path_length: filters of all gates together.
        distinct_paths: how many different paths the images took.
        keep_reached: whether the share of open filters on the validation images came within the tolerance of what was
            asked for; where it did not, the last epoch was kept.
        images: how many test images.
        layers: a row for each gated layer, in network order.
    """

    backbone_accuracy: float
    gates: GateFigures
    macs_left: float
    path_length: int
    distinct_paths: int
    keep_reached: bool
    images: int
    layers: tuple[LayerFigures, ...]


class BackboneTraining(Protocol):
    """What trains a backbone: `train_backbone`, or a cluster's."""

    def __call__(
        self, network: nn.Module, splits: Splits, schedule: Schedule, folder: Path, run: Mapping[str, object],
        listen: Listener,
    ) -> None:  # fmt: skip
        """As `train_backbone`."""


def make_backbone(
    name: str, splits: Splits, schedule: Schedule, folder: Path, listen: Listener, resize: bool = False,
    command: str = "", training: BackboneTraining = train_backbone,
) -> tuple[Bundle, BackboneFigures]:  # fmt: skip
    """Train a backbone from scratch into a new bundle; the same call goes on with an interrupted run.

    Args:
        name: of the network, in `detector.network.networks.NETWORKS`, or `package.module:function`, whose code is run.
        splits: the data.
        schedule: how long and how fast; its seed also draws the first weights.
        folder: the new bundle.
        listen: called after every step.
        resize: whether the network, when served, takes images of other sizes and resizes them.
        command: what the user typed, for the model card.
        training: what trains it.

    Raises:
        ArtifactError: `folder` already holds a bundle.
        DataError: a class has no training images.
        RequestError: the network is unknown or does not fit the images, or there is too little data for one step.
        TrainingError: see `detector.network.training.train_backbone`.
    """
    check_new(folder, BACKBONE_CHECKPOINTS)
    check_enough(splits.train, schedule)
    check_classes(splits.train)
    torch.manual_seed(schedule.seed)
    network = _fresh_backbone(name, splits.train).to(best_device())
    checkpoints = folder / BACKBONE_CHECKPOINTS
    run = {"stage": "backbone", "network": name, **data_facts(splits.train)}
    with checkpointed(checkpoints):
        training(network, splits, schedule, checkpoints, run, listen)
    begun = _begin(name, network, splits, folder, resize, {"command": command, "schedule": asdict(schedule)})
    shutil.rmtree(checkpoints)
    return begun


def import_backbone(
    name: str, weights: Path, splits: Splits, folder: Path, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, resize: bool = False, command: str = "",
) -> tuple[Bundle, BackboneFigures]:  # fmt: skip
    """Begin a bundle with a backbone that was trained elsewhere.

    Args:
        name: of the network, in `detector.network.networks.NETWORKS`, or `package.module:function`, whose code is run.
        weights: safetensors file.
        splits: the data that the network is for.
        folder: the new bundle.
        mean: see `detector.network.weights.load_weights`.
        std: likewise.
        resize: whether the network, when served, takes images of other sizes and resizes them.
        command: what the user typed, for the model card.

    Raises:
        ArtifactError: `folder` already holds a bundle.
        DataError: the weights cannot be read or do not fit, or a class has no training images.
        RequestError: the network is unknown or does not fit the images.
    """
    check_new(folder, BACKBONE_CHECKPOINTS)
    check_classes(splits.train)
    network = _fresh_backbone(name, splits.train)
    load_weights(network, weights, mean, std)
    made = {"command": command, **weights_facts(weights, mean, std)}
    return _begin(name, network.to(best_device()), splits, folder, resize, made)


def weights_facts(weights: Path, mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, object]:
    """What tells brought weights from others, JSON values.

    Raises:
        DataError: there is no such file.
    """
    try:
        digest = sha256_of(weights)
    except OSError as error:
        raise DataError(f"expected weights in {weights}, got: {error.strerror}") from None
    statistics = {"pixel_mean": list(mean), "pixel_std": list(std)} if mean is not None and std is not None else {}
    return {"weights": weights.name, "weights_sha256": digest, **statistics}


def make_decoupled(
    bundle: Bundle, splits: Splits, keep: float, objective: str, schedule: Schedule, folder: Path, listen: Listener,
    patterns: Sequence[str] = (), command: str = "",
) -> tuple[Bundle, DecoupledFigures]:  # fmt: skip
    """Decouple the backbone of `bundle` into `folder`; the same call goes on with an interrupted run.

    Args:
        bundle: with a trained backbone.
        splits: the data that the backbone was trained on.
        keep: share of filters to keep open, in (0, 1].
        objective: name of the loss, in `detector.network.losses.OBJECTIVES`.
        schedule: how long and how fast; its seed also draws the gates' first weights.
        folder: the bundle that grows: that of `bundle`, or another.
        listen: called after every step.
        patterns: gate only convolutions whose names fit one of these, with `*` and `?`; none for all.
        command: what the user typed, for the model card.

    Raises:
        ArtifactError: `folder` already holds a decoupled network.
        DataError: the data does not fit the backbone, or a class has no training images.
        RequestError: `keep` or `objective` is not one of the possible, or there is too little data for one step.
        TrainingError: see `detector.network.training.train_decoupled`.
    """
    if not 0 < keep <= 1:
        raise RequestError(f"expected a share of filters to keep in (0, 1], got {keep:g}")
    check_fits(bundle, splits.train)
    _check_grows(bundle, folder)
    check_enough(splits.train, schedule)
    check_classes(splits.train)
    terms = objective_named(objective)
    device = best_device()
    backbone = bundle.backbone().to(device)
    torch.manual_seed(schedule.seed)
    example = to_tensor(splits.train.pixels(slice(0, EXAMPLE_IMAGES)), device)
    network = decouple(backbone, target_share(keep, 0.0), terms.normalised, patterns, example).to(device)
    cost_of(network, example[:1])  # what cannot be counted fails before the training, not behind it
    checkpoints = folder / NETWORK_CHECKPOINTS
    run = {
        "stage": "network", "backbone": bundle.backbone_digest, "gates": dict(network.layers),
        **data_facts(splits.train),
    }  # fmt: skip
    with checkpointed(checkpoints):
        train_decoupled(network, backbone, splits, terms, keep, schedule, checkpoints, run, listen)
    figures = _decoupled_figures(network, backbone, splits, keep)
    training = {
        "command": command, "schedule": asdict(schedule), "figures": asdict(figures), **data_facts(splits.train),
    }  # fmt: skip
    named = network.graph.pairs if isinstance(network.graph, NamedGates) else {}
    gates = GatesInfo(keep, terms.normalised, objective, tuple(patterns), named)
    grown = add_network(bundle, folder, gates, network.cpu(), training)
    write_card(grown)
    shutil.rmtree(checkpoints)
    return grown, figures


def _fresh_backbone(name: str, images: ImageSet) -> nn.Module:
    """The named network, once it is known to take the images and to answer with their classes."""
    spec, classes = images.spec, len(images.class_names)
    network = build_network(name, spec.channels, classes, trusted=name)
    for tried in (copy.deepcopy(network).train(), network.eval()):  # training moves statistics: that is for a copy
        try:
            with torch.no_grad():
                answer = tried(torch.rand(2, spec.channels, spec.height, spec.width))
        except Exception as error:  # a user's own code may fail in any way
            reason = " ".join(str(error).split())[:200]
            raise RequestError(
                f"expected a network for images of {spec}, got {name}, which fails on them: {reason}"
            ) from None
        if not isinstance(answer, torch.Tensor) or answer.shape != (2, classes):
            shape = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
            mode = "training" if tried.training else "evaluation"
            raise RequestError(
                f"expected logits of shape (2, {classes}) for two images, got {shape} from {name} in {mode} mode"
            )
    return network


def _begin(
    name: str, network: nn.Module, splits: Splits, folder: Path, resize: bool, made: Mapping[str, object]
) -> tuple[Bundle, BackboneFigures]:
    figures = BackboneFigures(accuracy(network, splits.held_out), len(splits.held_out))
    images = splits.train
    info = NetworkInfo(name, images.class_names, replace(images.spec, resize=resize), images.name, images.digest)
    training = {**made, "figures": asdict(figures), **data_facts(images)}
    bundle = begin_bundle(folder, info, network.cpu(), training)
    write_card(bundle)
    return bundle, figures


def probe_images(images: ImageSet) -> ImageSet:
    """About `PROBE_IMAGES` of `images`, as many of each class as there are."""
    each = max(1, PROBE_IMAGES // len(images.class_names))
    chosen = [np.flatnonzero(images.labels == label)[:each] for label in range(len(images.class_names))]
    return images.subset(np.sort(np.concatenate(chosen)))


def _decoupled_figures(network: GatedNet, backbone: nn.Module, splits: Splits, keep: float) -> DecoupledFigures:
    held_out, probed = splits.held_out, probe_images(splits.train)
    spec = held_out.spec
    path = PathEncoding.stacked([evidence.path for evidence in encode_set(network, held_out)])
    fitted = PathEncoding.stacked([evidence.path for evidence in encode_set(network, probed)])
    cost = cost_of(network, torch.zeros(1, spec.channels, spec.height, spec.width, device=device_of(network)))
    return DecoupledFigures(
        backbone_accuracy=accuracy(backbone, held_out),
        gates=measure_gates(network, held_out),
        macs_left=float(cost.of(path).mean() / cost.dense),
        path_length=sum(network.layers.values()),
        distinct_paths=distinct_paths(path),
        keep_reached=abs(measure_gates(network, splits.validation).keep_ratio - keep) <= KEEP_TOLERANCE,
        images=len(held_out),
        layers=tuple(layer_figures(fitted, probed.labels, path, held_out.labels)),
    )


def data_facts(images: ImageSet) -> dict[str, object]:
    """What a stage was trained on, JSON values; a run is resumed on the same alone."""
    return {"data": images.name, "data_digest": images.digest, "training_images": len(images)}


def check_fits(bundle: Bundle, images: ImageSet, other_files: bool = False) -> None:
    """Refuse images that the bundle's network cannot take.

    Args:
        bundle: with a network.
        images: for it.
        other_files: whether they may be of another set than the one that it was trained on.

    Raises:
        DataError: another size, other channels, other classes or other files.
    """
    info = bundle.manifest.network
    wanted = (info.spec.height, info.spec.width, info.spec.channels)
    found = (images.spec.height, images.spec.width, images.spec.channels)
    if wanted != found:
        raise DataError(f"expected images of {info.spec} for {bundle.folder}, got {images.spec} in {images.name}")
    if info.data_digest != images.digest and not other_files:
        raise DataError(
            f"expected the images of {info.data} that {bundle.folder} was trained on, got {images.name} with other "
            "files: its splits would overlap with those that were trained on"
        )
    if info.classes != images.class_names:
        raise DataError(
            f"expected the classes {', '.join(info.classes)} for {bundle.folder}, got {', '.join(images.class_names)} "
            f"in {images.name}"
        )


def check_new(folder: Path, checkpoints: str) -> None:
    """Refuse a folder that holds a bundle; what an interruption left to do there is done.

    Args:
        folder: of the new bundle.
        checkpoints: name of the stage's checkpoints in it.

    Raises:
        ArtifactError: there is a bundle, or the folder cannot be written, which is better known before an epoch.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArtifactError(f"expected to write the bundle {folder}, got: {error.strerror}") from None
    if (folder / MANIFEST).exists():
        write_card(Bundle(folder))  # an interruption may have come between the bundle and its card
        shutil.rmtree(folder / checkpoints, ignore_errors=True)
        raise ArtifactError(f"expected a folder without a bundle, got {folder} with a finished one; give another --out")


def _check_grows(bundle: Bundle, folder: Path) -> None:
    """Refuse a folder that holds something else than the backbone of `bundle`."""
    if not (folder / MANIFEST).exists():
        return
    there = Bundle(folder)
    if there.manifest.gates is not None:
        write_card(there)
        shutil.rmtree(folder / NETWORK_CHECKPOINTS, ignore_errors=True)
        raise ArtifactError(f"expected a folder without a decoupled network, got {folder} with one; give another --out")
    if there.backbone_digest != bundle.backbone_digest:
        raise ArtifactError(f"expected a new folder or that of the backbone, got {folder} with another backbone")


def check_enough(images: ImageSet, schedule: Schedule) -> None:
    """Refuse a schedule that cannot train, or not on so few images.

    Raises:
        RequestError: see `Schedule.check`; or there is less than one batch.
    """
    schedule.check()
    if len(images) < schedule.batch:
        raise RequestError(f"expected at least one batch of {schedule.batch} training images, got {len(images)}")


def check_classes(images: ImageSet) -> None:
    """Refuse training images that lack a class.

    Raises:
        DataError: a class has none.
    """
    counts = np.bincount(images.labels, minlength=len(images.class_names))
    empty = [name for name, count in zip(images.class_names, counts, strict=True) if count == 0]
    if empty:
        raise DataError(f"expected training images of every class, got none of {', '.join(empty)}")


@contextmanager
def checkpointed(folder: Path) -> Iterator[None]:
    """Turns a full disk while a checkpoint is written into one line; the checkpoint before stays whole.

    Raises:
        TrainingError: the folder cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise TrainingError(f"expected to write {folder}, got: {reason}; the last checkpoint there is whole") from None
