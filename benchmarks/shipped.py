"""Makes the bundles that ship in `models/`, by the same commands that a user types, and judges them.

    python -m benchmarks.shipped [NAME...] [--data-dir DIR] [--models DIR] [--work DIR] [--published DIR]

Stages that a bundle already has are not made again, and an interrupted one goes on. One backbone serves all seeds of
ResNet-20: a seed is that of gates, order of images, augmentation, noise, attacks and detector. ResNet-56 begins with
published weights, which lie in the folder `--published`. The attacked images and the atlas stay in the work folder;
beside each bundle lies `evaluation.json`, what `pathguard evaluate` printed.
"""

import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_model

from attacks.suites import SUITES
from benchmarks.published import load_published
from detector.bundle import MANIFEST, Bundle
from detector.files import write_whole
from detector.stages import NETWORK_CHECKPOINTS

# Chosen on the fitting split: docs/detection.md.
FIT = (
    "--features gates+inputs+margins+doubts+path-likelihoods+gate-likelihoods --classifier mlp --overshoot yes --benign"
)
# Of bundles that were not fitted anew since. What ships of them gave benign kinds a fifth of the weight.
FORMER_FIT = (
    "--features bits+gates+margins+doubts+path-likelihoods+gate-likelihoods "
    "--classifier multinomial-0.01 --overshoot yes --benign"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one bundle is made.

    Attributes:
        data: name of the data set.
        decouple: options of `pathguard decouple`.
        attacks: what the detector is fitted on and judged by.
        limit: attacked images of each split.
        train: options of `pathguard train`; none where the backbone comes from elsewhere.
        backbone: the bundle whose backbone this one begins with.
        published: or the network and its published weights: `resnet56 resnet56-4bfd9763.th`.
        hardened: or the bundle whose decoupled network is hardened instead of decoupling one.
        harden: options of `pathguard harden`.
        fit: options of `pathguard fit`.
        seed: of all stages.
    """

    data: str
    decouple: str
    attacks: str
    limit: int
    train: str = ""
    backbone: str = ""
    published: str = ""
    hardened: str = ""
    harden: str = ""
    fit: str = FIT
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Folders:
    """Where things lie.

    Attributes:
        data: the data sets; None for cache or download.
        models: the bundles.
        work: attacked images, and what else is made on the way.
        published: published weights.
    """

    data: Path | None
    models: Path
    work: Path
    published: Path


@dataclass(frozen=True, slots=True)
class Taken:
    """What making a decoupled network took.

    Attributes:
        minutes: of the wall clock; None where it went on from an interrupted one.
        peak_gb: memory of its process, at the most.
    """

    minutes: float | None
    peak_gb: float


CIFAR10 = Recipe(
    data="cifar10",
    train="--network resnet20 --epochs 60 --cycles 2 --learning-rate 0.15",
    decouple="--keep 0.7",
    attacks="standard,jsma,autoattack",
    limit=1500,
)
# Without the two that take longest for an image, on a third of the images: each costs three times as much.
RESNET56_ATTACKS = ",".join(
    (*(name for name in SUITES["standard"].members if name not in ("ddn", "ead")), "jsma", "autoattack")
)
# Attacks take all their steps on a network that withstands them: one or two of each kind, on a third of the images.
HARDENED = replace(
    CIFAR10, train="", decouple="", hardened="cifar10-resnet20-seed0", limit=500,
    attacks="fgsm,fgsm-2,bim-end,pgd,pgd-2,pgd-l2,pgd-end,pgd-end-2,pgd-l2-end,apgd-ce,apgd-dlr,deepfool,cw,square",
)  # fmt: skip
SHIPPED: Mapping[str, Recipe] = {
    "fashion-mnist-resnet8": Recipe(
        data="fashion-mnist",
        train="--network resnet8 --epochs 12 --learning-rate 0.2",
        decouple="--keep 0.7 --epochs 12 --settle 0",
        attacks="fgsm,pgd,pgd-2,pgd-l2,deepfool,cw",
        limit=2000,
        fit=FORMER_FIT,
    ),
    "cifar10-resnet20": replace(
        CIFAR10, decouple="--keep 0.7 --epochs 16 --settle 0",
        attacks="fgsm,pgd,pgd-2,pgd-l2,pgd-end,pgd-end-2,pgd-l2-end,deepfool,cw", fit=FORMER_FIT,
    ),
    **{
        f"cifar10-resnet20-seed{seed}": replace(CIFAR10, train="", backbone="cifar10-resnet20", seed=seed)
        for seed in (0, 1, 2)
    },
    "cifar10-resnet56": replace(
        CIFAR10, train="", published="resnet56 resnet56-4bfd9763.th", decouple="--keep 0.6",
        attacks=RESNET56_ATTACKS, limit=500,
    ),
    "cifar10-resnet20-hardened": replace(HARDENED, harden="--part network --epochs 16 --learning-rate 0.1"),
    "cifar10-resnet20-hardened-gates": replace(
        HARDENED, harden="--part gates --trade 1 --epochs 2 --learning-rate 0.01"
    ),
}  # fmt: skip


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Bundles to make; all where none is named.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the data sets lie; else cache or download.")] = None,
    models: Annotated[Path, typer.Option(help="Folder of the bundles.")] = Path("models"),
    work: Annotated[Path, typer.Option(help="Folder of the attacked images.")] = Path("runs/shipped"),
    published: Annotated[Path, typer.Option(help="Folder of published weights.")] = Path("runs/published"),
) -> None:
    """Make what is missing."""
    folders = Folders(data_dir, models, work, published)
    for name in names or SHIPPED:
        if name not in SHIPPED:
            raise typer.BadParameter(f"expected bundles of {', '.join(SHIPPED)}, got {name}")
        attacks = attacked(name, folders)
        bundle = detected(name, folders)
        if not bundle.has_usual_paths:
            data = SHIPPED[name].data
            _run(f"interpret --bundle {bundle.folder} --data {data} --attacks {attacks} --out {attacks}-atlas", folders)
        judged = _run(f"evaluate --bundle {bundle.folder} --attacks {attacks} --json", folders)
        write_whole(bundle.folder / "evaluation.json", judged)


def decoupled(name: str, folders: Folders) -> Taken | None:
    """Make the bundle `name` of `SHIPPED` up to its decoupled network.

    Returns:
        what the decoupling took; None where it was there.

    Raises:
        ArtifactError: the published weights are missing or are not such.
        subprocess.CalledProcessError: a command failed.
    """
    recipe, bundle = SHIPPED[name], folders.models / name
    if (bundle / MANIFEST).exists() and Bundle(bundle).manifest.gates is not None:
        return None
    command = f"decouple --network {bundle} {recipe.decouple}"
    if recipe.hardened:
        decoupled(recipe.hardened, folders)
        command = f"harden --bundle {folders.models / recipe.hardened} {recipe.harden}"
    elif recipe.backbone:
        command = f"decouple --network {folders.models / recipe.backbone} {recipe.decouple}"
    elif recipe.published:
        network, file = recipe.published.split()
        weights = folders.work / f"{Path(file).stem}.safetensors"
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_model(load_published(folders.published / file), str(weights))
        command = f"decouple --network {network} --weights {weights} --data {recipe.data} {recipe.decouple}"
    elif not (bundle / MANIFEST).exists():
        _run(f"train --data {recipe.data} {recipe.train} --seed {recipe.seed} --out {bundle}", folders)
    interrupted, began = (bundle / NETWORK_CHECKPOINTS).exists(), time.monotonic()
    _run(f"{command} --seed {recipe.seed} --out {bundle}", folders)
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return Taken(None if interrupted else (time.monotonic() - began) / 60, peak_kb / 2**20)


def attacked(name: str, folders: Folders) -> Path:
    """Attack the decoupled network of the bundle `name`, which is made if missing; the folder of the images.

    Raises:
        ArtifactError, subprocess.CalledProcessError: as `decoupled`.
    """
    decoupled(name, folders)
    recipe, images = SHIPPED[name], folders.work / name
    options = f"--recipes {recipe.attacks} --limit {recipe.limit} --seed {recipe.seed}"
    _run(f"attack --bundle {folders.models / name} {options} --out {images}", folders)
    return images


def detected(name: str, folders: Folders) -> Bundle:
    """The bundle `name` with a detector, which is fitted if missing.

    Raises:
        ArtifactError, subprocess.CalledProcessError: as `decoupled`.
    """
    folder = folders.models / name
    decoupled(name, folders)
    if Bundle(folder).manifest.detector is None:
        images = attacked(name, folders)
        _run(f"fit --bundle {folder} --attacks {images} {SHIPPED[name].fit} --seed {SHIPPED[name].seed}", folders)
    return Bundle(folder)


def _run(command: str, folders: Folders) -> bytes:
    """What the command printed; the folder of the data is told by a variable, so that model cards do not name it."""
    print(f"pathguard {command}", file=sys.stderr, flush=True)
    environment = {**os.environ, **({"PATHGUARD_DATA_DIR": str(folders.data)} if folders.data else {})}
    arguments: Sequence[str] = [sys.executable, "-m", "pathguard", *shlex.split(command)]
    return subprocess.run(arguments, env=environment, check=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    typer.run(main)
