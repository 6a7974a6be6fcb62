"""The first two stages of a bundle: a trained backbone, then the decoupled network."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from detector.batches import best_device, device_of
from detector.bundle import MANIFEST, Bundle, GatesInfo, NetworkInfo, add_network, begin_bundle
from detector.datasets import ImageSet, Splits
from detector.decouple import GatedNet, decouple
from detector.encoder import encode_set
from detector.errors import ArtifactError, DataError, RequestError, TrainingError
from detector.losses import objective_named
from detector.macs import cost_of
from detector.networks import build_network
from detector.schedule import Schedule
from detector.training import GateFigures, Listener, accuracy, measure_gates, train_backbone, train_decoupled


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
        images: how many test images.
    """

    backbone_accuracy: float
    gates: GateFigures
    macs_left: float
    path_length: int
    images: int


def make_backbone(
    name: str, splits: Splits, schedule: Schedule, folder: Path, listen: Listener, resize: bool = False
) -> tuple[Bundle, BackboneFigures]:
    """Train a backbone from scratch into a new bundle; the same call goes on with an interrupted run.

    Args:
        name: of the network, in `detector.networks.NETWORKS`.
        splits: the data.
        schedule: how long and how fast; its seed also draws the first weights.
        folder: the new bundle.
        listen: called after every step.
        resize: whether the network, when served, takes images of other sizes and resizes them.

    Raises:
        ArtifactError: `folder` already holds a bundle.
        RequestError: the network is unknown, or there is too little data for one step.
        TrainingError: see `detector.training.train_backbone`.
    """
    if (folder / MANIFEST).exists():
        raise ArtifactError(f"expected a folder without a bundle, got {folder} with a finished one; give another --out")
    _check_enough(splits.train, schedule)
    spec, classes = splits.train.spec, splits.train.class_names
    torch.manual_seed(schedule.seed)
    network = build_network(name, spec.channels, len(classes)).to(best_device())
    checkpoints = folder / "checkpoint-backbone"
    run = {"stage": "backbone", "network": name, **_data_facts(splits.train)}
    with _checkpointed(checkpoints):
        train_backbone(network, splits, schedule, checkpoints, run, listen)
    figures = BackboneFigures(accuracy(network, splits.held_out), len(splits.held_out))
    info = NetworkInfo(name, classes, replace(spec, resize=resize), splits.train.name, splits.train.digest)
    training = {"schedule": asdict(schedule), "figures": asdict(figures), **_data_facts(splits.train)}
    bundle = begin_bundle(folder, info, network.cpu(), training)
    shutil.rmtree(checkpoints)
    return bundle, figures


def make_decoupled(
    bundle: Bundle, splits: Splits, keep: float, objective: str, schedule: Schedule, folder: Path, listen: Listener
) -> tuple[Bundle, DecoupledFigures]:
    """Decouple the backbone of `bundle` into `folder`; the same call goes on with an interrupted run.

    Args:
        bundle: with a trained backbone.
        splits: the data that the backbone was trained on.
        keep: share of filters to keep open, in (0, 1].
        objective: name of the loss, in `detector.losses.OBJECTIVES`.
        schedule: how long and how fast; its seed also draws the gates' first weights.
        folder: the bundle that grows: that of `bundle`, or another.
        listen: called after every step.

    Raises:
        ArtifactError: `folder` already holds a decoupled network.
        DataError: the data does not fit the backbone.
        RequestError: `keep` or `objective` is not one of the possible, or there is too little data for one step.
        TrainingError: see `detector.training.train_decoupled`.
    """
    check_fits(bundle, splits.train)
    if (folder / MANIFEST).exists() and Bundle(folder).manifest.gates is not None:
        raise ArtifactError(f"expected a folder without a decoupled network, got {folder} with one; give another --out")
    _check_enough(splits.train, schedule)
    terms = objective_named(objective)
    device = best_device()
    backbone = bundle.backbone().to(device)
    torch.manual_seed(schedule.seed)
    network = decouple(backbone, keep, terms.normalised).to(device)
    checkpoints = folder / "checkpoint-network"
    run = {"stage": "network", "backbone": bundle.backbone_digest, **_data_facts(splits.train)}
    with _checkpointed(checkpoints):
        train_decoupled(network, backbone, splits, terms, keep, schedule, checkpoints, run, listen)
    figures = DecoupledFigures(
        backbone_accuracy=accuracy(backbone, splits.held_out),
        gates=measure_gates(network, splits.held_out),
        macs_left=_macs_left(network, splits.held_out),
        path_length=sum(network.layers.values()),
        images=len(splits.held_out),
    )
    training = {"schedule": asdict(schedule), "figures": asdict(figures), **_data_facts(splits.train)}
    grown = add_network(bundle, folder, GatesInfo(keep, terms.normalised, objective), network.cpu(), training)
    shutil.rmtree(checkpoints)
    return grown, figures


def _data_facts(images: ImageSet) -> dict[str, object]:
    return {"data": images.name, "data_digest": images.digest, "training_images": len(images)}


def _macs_left(network: GatedNet, images: ImageSet) -> float:
    spec = images.spec
    cost = cost_of(network, torch.zeros(1, spec.channels, spec.height, spec.width, device=device_of(network)))
    per_image = np.concatenate([cost.of(evidence.path) for evidence in encode_set(network, images)])
    return float(per_image.mean() / cost.dense)


def check_fits(bundle: Bundle, images: ImageSet) -> None:
    """Refuse images that the bundle's network cannot take.

    Raises:
        DataError: another size, other channels or other classes.
    """
    info = bundle.manifest.network
    wanted = (info.spec.height, info.spec.width, info.spec.channels)
    found = (images.spec.height, images.spec.width, images.spec.channels)
    if wanted != found:
        raise DataError(f"expected images of {info.spec} for {bundle.folder}, got {images.spec} in {images.name}")
    if info.data_digest != images.digest:
        raise DataError(
            f"expected the images of {info.data} that {bundle.folder} was trained on, got {images.name} with other "
            "files: its splits would overlap with those that were trained on"
        )
    if info.classes != images.class_names:
        raise DataError(
            f"expected the classes {', '.join(info.classes)} for {bundle.folder}, got {', '.join(images.class_names)} "
            f"in {images.name}"
        )


def _check_enough(images: ImageSet, schedule: Schedule) -> None:
    schedule.check()
    if len(images) < schedule.batch:
        raise RequestError(f"expected at least one batch of {schedule.batch} training images, got {len(images)}")


@contextmanager
def _checkpointed(folder: Path) -> Iterator[None]:
    """Turns a full disk while a checkpoint is written into one line; the checkpoint before stays whole."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise TrainingError(f"expected to write {folder}, got: {reason}; the last checkpoint there is whole") from None
