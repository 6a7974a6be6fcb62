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

from benchmarks.published import load_published
from detector.bundle import MANIFEST, Bundle
from detector.files import write_whole
from detector.stages import NETWORK_CHECKPOINTS


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
        seed: of all stages.
    """

    data: str
    decouple: str
    attacks: str
    limit: int
    train: str = ""
    backbone: str = ""
    published: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Taken:
    """What making a decoupled network took.

    Attributes:
        minutes: of the wall clock; None where it went on from an interrupted one.
        peak_gb: memory of its process, at the most.
    """

    minutes: float | None
    peak_gb: float


# Chosen on the fitting split: docs/detection.md.
FIT = "--classifier multinomial-0.01 --overshoot yes --benign"

CIFAR10 = Recipe(
    data="cifar10",
    train="--network resnet20 --epochs 60 --cycles 2 --learning-rate 0.15",
    decouple="--keep 0.7",
    attacks="fgsm,pgd,pgd-2,pgd-l2,pgd-end,pgd-end-2,pgd-l2-end,deepfool,cw",
    limit=1500,
)
SHIPPED: Mapping[str, Recipe] = {
    "fashion-mnist-resnet8": Recipe(
        data="fashion-mnist",
        train="--network resnet8 --epochs 12 --learning-rate 0.2",
        decouple="--keep 0.7 --epochs 12 --settle 0",
        attacks="fgsm,pgd,pgd-2,pgd-l2,deepfool,cw",
        limit=2000,
    ),
    "cifar10-resnet20": replace(CIFAR10, decouple="--keep 0.7 --epochs 16 --settle 0"),
    **{
        f"cifar10-resnet20-seed{seed}": replace(CIFAR10, train="", backbone="cifar10-resnet20", seed=seed)
        for seed in (0, 1, 2)
    },
    "cifar10-resnet56": replace(
        CIFAR10, train="", published="resnet56 resnet56-4bfd9763.th", decouple="--keep 0.6"
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
    for name in names or SHIPPED:
        if name not in SHIPPED:
            raise typer.BadParameter(f"expected bundles of {', '.join(SHIPPED)}, got {name}")
        decoupled(name, models, work, data_dir, published)
        _detected(name, models / name, work / name, data_dir)


def decoupled(name: str, models: Path, work: Path, data_dir: Path | None, published: Path) -> Taken | None:
    """Make the bundle `name` of `SHIPPED` in `models` up to its decoupled network.

    Args:
        name: of the bundle, and of its folder.
        models: folder of all bundles.
        work: folder of what is made on the way.
        data_dir: where the data sets lie.
        published: folder of published weights.

    Returns:
        what the decoupling took; None where it was there.

    Raises:
        ArtifactError: the published weights are missing or are not such.
        subprocess.CalledProcessError: a command failed.
    """
    recipe, bundle = SHIPPED[name], models / name
    if (bundle / MANIFEST).exists() and Bundle(bundle).manifest.gates is not None:
        return None
    source = str(bundle)
    if recipe.backbone:
        source = str(models / recipe.backbone)
    elif recipe.published:
        network, file = recipe.published.split()
        weights = work / f"{Path(file).stem}.safetensors"
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_model(load_published(published / file), str(weights))
        source = f"{network} --weights {weights} --data {recipe.data}"
    elif not (bundle / MANIFEST).exists():
        _run(f"train --data {recipe.data} {recipe.train} --seed {recipe.seed} --out {bundle}", data_dir)
    interrupted, began = (bundle / NETWORK_CHECKPOINTS).exists(), time.monotonic()
    _run(f"decouple --network {source} {recipe.decouple} --seed {recipe.seed} --out {bundle}", data_dir)
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return Taken(None if interrupted else (time.monotonic() - began) / 60, peak_kb / 2**20)


def _detected(name: str, bundle: Path, attacks: Path, data_dir: Path | None) -> None:
    """Give the bundle its detector and its usual paths, and judge it."""
    recipe = SHIPPED[name]
    options = f"--recipes {recipe.attacks} --limit {recipe.limit} --seed {recipe.seed}"
    _run(f"attack --bundle {bundle} {options} --out {attacks}", data_dir)
    if Bundle(bundle).manifest.detector is None:
        _run(f"fit --bundle {bundle} --attacks {attacks} {FIT} --seed {recipe.seed}", data_dir)
    if not Bundle(bundle).has_usual_paths:
        _run(f"interpret --bundle {bundle} --data {recipe.data} --attacks {attacks} --out {attacks}-atlas", data_dir)
    judged = _run(f"evaluate --bundle {bundle} --attacks {attacks} --json", data_dir)
    write_whole(bundle / "evaluation.json", judged)


def _run(command: str, data_dir: Path | None) -> bytes:
    """What the command printed; the folder of the data is told by a variable, so that model cards do not name it."""
    print(f"pathguard {command}", file=sys.stderr, flush=True)
    environment = {**os.environ, **({"PATHGUARD_DATA_DIR": str(data_dir)} if data_dir else {})}
    arguments: Sequence[str] = [sys.executable, "-m", "pathguard", *shlex.split(command)]
    return subprocess.run(arguments, env=environment, check=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    typer.run(main)
