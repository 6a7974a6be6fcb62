"""`pathguard harden`: a network that is harder to mislead without a trace."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from pathguard.commands.options import BundleDir, DataDir, ImageSize, Json, Seed, Trust, splits_of
from pathguard.progress import training_bar
from pathguard.tables import row_of, show


def harden(
    bundle: BundleDir,
    out: Annotated[Path, typer.Option(help="Folder of the hardened bundle.")],
    part: Annotated[str, typer.Option(help="What is trained: gates, or the whole network.")] = "network",
    epsilon: Annotated[float, typer.Option(help="Budget of the attacks, in grey levels of 255.", min=0.1)] = 8.0,
    steps: Annotated[int, typer.Option(help="Steps of each attack.", min=1)] = 2,
    trade: Annotated[
        float, typer.Option(help="TRADES' weight, such as 6; 0 trains on the attacked images alone.", min=0.0)
    ] = 0.0,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 8,
    batch: Annotated[int, typer.Option(help="Images per step.", min=2)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 0.02,
    flip: Annotated[bool, typer.Option(help="Mirror half of the training images.")] = True,
    limit: Annotated[int | None, typer.Option(help="Train on the first N images only.", min=1)] = None,
    seed: Seed = 0,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Fine-tune a decoupled network on images that evade its path; attack it and fit its detector anew afterwards."""
    from dataclasses import replace

    from attacks.hardening import Hardening
    from attacks.hardening import harden as run
    from detector.bundle import Bundle
    from detector.memory import keep_freed_memory
    from detector.network.schedule import Schedule

    keep_freed_memory()
    opened = Bundle(bundle, trust)
    splits = splits_of(opened.manifest.network.data, data_dir, image_size)
    splits = replace(splits, train=splits.train.first(limit))
    hardening = Hardening(part, epsilon / 255, steps, trade=trade)  # type: ignore[arg-type]  # it checks the name itself
    schedule = Schedule(epochs, batch, learning_rate, flip=flip, seed=seed)
    command = shlex.join(["pathguard", *sys.argv[1:]])
    with training_bar("harden") as listen:
        _, figures = run(opened, splits, hardening, schedule, out, listen, command)
    show(f"hardened network in {out}", [row_of(figures)], json_)
