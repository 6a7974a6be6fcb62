"""`pathguard train` and `pathguard decouple`: the stages of a bundle that make its network."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pathguard.commands.options import BundleDir, Data, DataDir, ImageSize, Json, Seed, splits_of
from pathguard.progress import training_bar
from pathguard.tables import row_of, show


def train(
    out: Annotated[Path, typer.Option(help="Folder of the new bundle.")],
    data: Data = "cifar10",
    network: Annotated[
        str, typer.Option(help="resnet8, resnet14, resnet20, resnet56, vggnet, googlenet or resnet18.")
    ] = "resnet20",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 40,
    batch: Annotated[int, typer.Option(help="Images per step.", min=2)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 0.15,
    cycles: Annotated[int, typer.Option(help="How often it warms up and falls to nothing.", min=1)] = 1,
    resize: Annotated[bool, typer.Option(help="Let the served network take images of any size.")] = False,
    flip: Annotated[bool, typer.Option(help="Mirror half of the training images.")] = True,
    limit: Annotated[int | None, typer.Option(help="Train on the first N images only.", min=1)] = None,
    seed: Seed = 0,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    json_: Json = False,
) -> None:
    """Train a plain backbone: the first stage of a bundle. Run again to go on after an interruption."""
    from detector.schedule import Schedule
    from detector.stages import make_backbone

    splits = splits_of(data, data_dir, image_size)
    splits = replace(splits, train=splits.train.first(limit))
    schedule = Schedule(epochs, batch, learning_rate, flip=flip, seed=seed, cycles=cycles)
    with training_bar(f"train {network}") as listen:
        _, figures = make_backbone(network, splits, schedule, out, listen, resize)
    show(f"backbone {network} in {out}", [row_of(figures)], json_)


def decouple(
    bundle: BundleDir,
    keep: Annotated[float, typer.Option(help="Share of filters to keep open, in (0, 1].")] = 0.7,
    out: Annotated[Path | None, typer.Option(help="Folder of the grown bundle; by default the bundle itself.")] = None,
    objective: Annotated[str, typer.Option(help="Loss: pathguard, or li2020 as published.")] = "pathguard",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 16,
    batch: Annotated[int, typer.Option(help="Images per step.", min=2)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 0.05,
    flip: Annotated[bool, typer.Option(help="Mirror half of the training images.")] = True,
    limit: Annotated[int | None, typer.Option(help="Train on the first N images only.", min=1)] = None,
    seed: Seed = 0,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    json_: Json = False,
) -> None:
    """Put gates into the backbone and train them: the second stage. Run again to go on after an interruption."""
    from detector.bundle import Bundle
    from detector.schedule import Schedule
    from detector.stages import make_decoupled

    opened = Bundle(bundle)
    splits = splits_of(opened.manifest.network.data, data_dir, image_size)
    splits = replace(splits, train=splits.train.first(limit))
    schedule = Schedule(epochs, batch, learning_rate, flip=flip, seed=seed)
    with training_bar("decouple") as listen:
        grown, figures = make_decoupled(opened, splits, keep, objective, schedule, out or bundle, listen)
    show(f"decoupled network in {grown.folder}", [row_of(figures)], json_)
