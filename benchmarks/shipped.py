"""Makes the bundles that ship in `models/`, by the same commands that a user types, and judges them.

    python -m benchmarks.shipped [NAME...] [--data-dir DIR] [--models DIR] [--work DIR]

Stages that a bundle already has are not made again, and an interrupted one goes on. The seed is 0 throughout. The
attacked images and the atlas stay in the work folder; beside each bundle lies `evaluation.json`, what `pathguard
evaluate` printed.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from detector.bundle import MANIFEST, Bundle
from detector.files import write_whole


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one bundle is made.

    Attributes:
        data: name of the data set.
        train: options of `pathguard train`.
        decouple: options of `pathguard decouple`.
        attacks: what the detector is fitted on and judged by.
        limit: attacked images of each split.
    """

    data: str
    train: str
    decouple: str
    attacks: str
    limit: int


# Chosen on the fitting split: docs/detection.md.
FIT = "--classifier multinomial-0.01 --overshoot yes --benign"

SHIPPED: Mapping[str, Recipe] = {
    "fashion-mnist-resnet8": Recipe(
        data="fashion-mnist",
        train="--network resnet8 --epochs 12 --learning-rate 0.2",
        decouple="--keep 0.7 --epochs 12 --settle 0",
        attacks="fgsm,pgd,pgd-2,pgd-l2,deepfool,cw",
        limit=2000,
    ),
    "cifar10-resnet20": Recipe(
        data="cifar10",
        train="--network resnet20 --epochs 60 --cycles 2 --learning-rate 0.15",
        decouple="--keep 0.7 --epochs 16 --settle 0",
        attacks="fgsm,pgd,pgd-2,pgd-l2,pgd-end,pgd-end-2,pgd-l2-end,deepfool,cw",
        limit=1500,
    ),
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Bundles to make; all where none is named.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the data sets lie; else cache or download.")] = None,
    models: Annotated[Path, typer.Option(help="Folder of the bundles.")] = Path("models"),
    work: Annotated[Path, typer.Option(help="Folder of the attacked images.")] = Path("runs/shipped"),
) -> None:
    """Make what is missing."""
    for name in names or SHIPPED:
        if name not in SHIPPED:
            raise typer.BadParameter(f"expected bundles of {', '.join(SHIPPED)}, got {name}")
        _make(SHIPPED[name], models / name, work / name, data_dir)


def _make(recipe: Recipe, bundle: Path, work: Path, data_dir: Path | None) -> None:
    if not (bundle / MANIFEST).exists():
        _run(f"train --data {recipe.data} {recipe.train} --seed 0 --out {bundle}", data_dir)
    if Bundle(bundle).manifest.gates is None:
        _run(f"decouple --network {bundle} {recipe.decouple} --seed 0", data_dir)
    _run(f"attack --bundle {bundle} --recipes {recipe.attacks} --limit {recipe.limit} --out {work}", data_dir)
    if Bundle(bundle).manifest.detector is None:
        _run(f"fit --bundle {bundle} --attacks {work} {FIT} --seed 0", data_dir)
    if not Bundle(bundle).has_usual_paths:
        _run(f"interpret --bundle {bundle} --data {recipe.data} --attacks {work} --out {work}-atlas", data_dir)
    judged = _run(f"evaluate --bundle {bundle} --attacks {work} --json", data_dir)
    write_whole(bundle / "evaluation.json", judged)


def _run(command: str, data_dir: Path | None) -> bytes:
    """What the command printed; the folder of the data is told by a variable, so that model cards do not name it."""
    print(f"pathguard {command}", file=sys.stderr, flush=True)
    environment = {**os.environ, **({"PATHGUARD_DATA_DIR": str(data_dir)} if data_dir else {})}
    arguments: Sequence[str] = [sys.executable, "-m", "pathguard", *shlex.split(command)]
    return subprocess.run(arguments, env=environment, check=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    typer.run(main)
