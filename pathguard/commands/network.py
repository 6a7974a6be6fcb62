"""`pathguard train` and `pathguard decouple`: the stages of a bundle that make its network."""

import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detector.network.schedule import DECOUPLING, Schedule
from pathguard.commands.options import Data, DataDir, ImageSize, Json, Ray, Seed, Trust, splits_of
from pathguard.progress import training_bar
from pathguard.tables import row_of, show

if TYPE_CHECKING:
    from detector.bundle import Bundle
    from detector.stages import BackboneTraining, DecoupledFigures

NAMES = "resnet8, resnet14, resnet20, resnet56, vggnet, googlenet, resnet18, or package.module:function of your own"


def train(
    out: Annotated[Path, typer.Option(help="Folder of the new bundle.")],
    data: Data = "cifar10",
    network: Annotated[str, typer.Option(help=f"One of {NAMES}.")] = "resnet20",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 40,
    batch: Annotated[int, typer.Option(help="Images per step.", min=2)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 0.15,
    cycles: Annotated[int, typer.Option(help="How often it warms up and falls to nothing.", min=1)] = 1,
    resize: Annotated[bool, typer.Option(help="Let the served network take images of any size.")] = False,
    flip: Annotated[bool, typer.Option(help="Mirror half of the training images.")] = True,
    limit: Annotated[int | None, typer.Option(help="Train on the first N images only.", min=1)] = None,
    seed: Seed = 0,
    ray: Ray = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    json_: Json = False,
) -> None:
    """Train a plain backbone: the first stage of a bundle. Run again to go on after an interruption."""
    from detector.memory import keep_freed_memory
    from detector.stages import make_backbone

    keep_freed_memory()
    splits = splits_of(data, data_dir, image_size)
    splits = replace(splits, train=splits.train.first(limit))
    schedule = Schedule(epochs, batch, learning_rate, flip=flip, seed=seed, cycles=cycles)
    with _training_of(ray) as training, training_bar(f"train {network}") as listen:
        _, figures = make_backbone(network, splits, schedule, out, listen, resize, _command(), training)
    show(f"backbone {network} in {out}", [row_of(figures)], json_)


@contextmanager
def _training_of(ray: str | None) -> "Iterator[BackboneTraining]":
    """What trains: this process, or all free processors of a Ray cluster."""
    if ray is None:
        from detector.network.training import train_backbone

        yield train_backbone
        return
    from cluster.training import ray_training

    with ray_training(ray) as training:
        yield training


def decouple(
    network: Annotated[
        str, typer.Option(help=f"Folder of a backbone that `pathguard train` made; or, with --weights: {NAMES}.")
    ],
    keep: Annotated[float, typer.Option(help="Share of filters to keep open, in (0, 1].")] = 0.7,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the grown bundle; by default that of the backbone itself.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Trained weights for the named network, safetensors; needs --data and --out.")
    ] = None,
    pixel_mean: Annotated[
        str | None, typer.Option(help="Mean of the pixels in [0, 1] that --weights were trained with: 0.5,0.5,0.5.")
    ] = None,
    pixel_std: Annotated[str | None, typer.Option(help="Standard deviation of those pixels.")] = None,
    resize: Annotated[
        bool, typer.Option(help="With --weights: let the served network take images of any size.")
    ] = False,
    gate: Annotated[
        str, typer.Option(help="Gate only convolutions with such names, by commas, with * and ?; else all that can be.")
    ] = "",
    objective: Annotated[str, typer.Option(help="Loss: pathguard, or li2020 as published.")] = "pathguard",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = DECOUPLING.epochs,
    batch: Annotated[int, typer.Option(help="Images per step.", min=2)] = DECOUPLING.batch,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = DECOUPLING.learning_rate,
    settle: Annotated[
        float, typer.Option(help="Share of the training, at its end, in which the gates are held; in [0, 1).")
    ] = DECOUPLING.settling,
    flip: Annotated[bool, typer.Option(help="Mirror half of the training images.")] = True,
    limit: Annotated[int | None, typer.Option(help="Train on the first N images only.", min=1)] = None,
    seed: Seed = 0,
    data: Annotated[
        str | None, typer.Option(help="Data set; by default the one that the backbone was trained on.")
    ] = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Put gates into a backbone and train them: the second stage. Run again to go on after an interruption."""
    from detector.bundle import Bundle
    from detector.memory import keep_freed_memory
    from detector.network.networks import NETWORKS
    from detector.stages import make_decoupled

    keep_freed_memory()
    if weights is not None:
        opened = _brought(network, weights, data, data_dir, image_size, out, pixel_mean, pixel_std, resize)
    else:
        if ":" in network or (network in NETWORKS and not Path(network).exists()):
            raise typer.BadParameter(f"expected --weights beside the network {network}, or the folder of a backbone")
        if pixel_mean is not None or pixel_std is not None:
            raise typer.BadParameter("expected --weights beside --pixel-mean and --pixel-std, got none")
        opened = Bundle(Path(network), trust)
    splits = splits_of(data or opened.manifest.network.data, data_dir, image_size)
    splits = replace(splits, train=splits.train.first(limit))
    schedule = Schedule(epochs, batch, learning_rate, flip=flip, seed=seed, settling=settle)
    patterns = tuple(pattern.strip() for pattern in gate.split(",") if pattern.strip())
    folder = out or opened.folder
    with training_bar("decouple") as listen:
        grown, figures = make_decoupled(opened, splits, keep, objective, schedule, folder, listen, patterns, _command())
    _show_decoupled(grown, figures, json_)


def _brought(
    network: str, weights: Path, data: str | None, data_dir: Path | None, image_size: int | None, out: Path | None,
    pixel_mean: str | None, pixel_std: str | None, resize: bool,
) -> "Bundle":  # fmt: skip
    """The backbone of `weights` as a bundle in `out`, which an interrupted run may have begun already."""
    from detector.bundle import MANIFEST, Bundle
    from detector.stages import import_backbone, weights_facts

    if data is None or out is None:
        raise typer.BadParameter("expected --data and --out beside --weights")
    if (pixel_mean is None) != (pixel_std is None):
        raise typer.BadParameter("expected both --pixel-mean and --pixel-std, or neither")
    mean, std = (_numbers(text) if text is not None else None for text in (pixel_mean, pixel_std))
    if (out / MANIFEST).exists():
        begun = Bundle(out, network if ":" in network else None)
        info = begun.manifest.network
        wanted = {"network": network, "resize": resize, **weights_facts(weights, mean, std)}
        found = {"network": info.name, "resize": info.spec.resize, **begun.manifest.training["backbone"]}
        for name, value in wanted.items():
            if found.get(name) != value:
                raise typer.BadParameter(
                    f"expected {out} to be new or begun with {name} {value}, got {found.get(name)}; give another --out"
                )
        return begun
    splits = splits_of(data, data_dir, image_size)
    bundle, _ = import_backbone(network, weights, splits, out, mean, std, resize, _command())
    return bundle


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise typer.BadParameter(f"expected numbers by commas, got {text!r}")
    return numbers


def _show_decoupled(bundle: "Bundle", figures: "DecoupledFigures", json_: bool) -> None:
    row = row_of(figures)
    del row["layers"]
    if json_:
        show("", [{**row, "layers": [row_of(layer) for layer in figures.layers]}], as_json=True)
        return
    show(
        f"gated layers on {figures.images} test images (information in nats, at least)",
        [row_of(layer) for layer in figures.layers],
    )
    show(f"decoupled network in {bundle.folder}", [row])
    if not figures.keep_reached:
        asked = bundle.manifest.gates.keep if bundle.manifest.gates else float("nan")
        print(
            f"note: the share of open filters missed the {asked:g} that was asked for; the last epoch was kept. More "
            "epochs or another objective may reach it.", file=sys.stderr,
        )  # fmt: skip


def _command() -> str:
    """What the user typed, for the model card."""
    return shlex.join(["pathguard", *sys.argv[1:]])
