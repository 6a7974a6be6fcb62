"""`pathguard attack`: attacked images, on disk."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pathguard.commands.options import BundleDir, DataDir, ImageSize, Json, Seed, splits_of
from pathguard.progress import attack_bar
from pathguard.tables import show


def attack(
    bundle: BundleDir,
    out: Annotated[Path, typer.Option(help="Folder for the attacked images; an unfinished one is finished.")],
    recipes: Annotated[str, typer.Option(help="Attacks, by commas.")] = "fgsm,pgd,pgd-l2",
    limit: Annotated[int | None, typer.Option(help="Attack at most N images of each split.", min=1)] = None,
    shard_images: Annotated[int, typer.Option(help="Images in memory at a time.", min=1)] = 250,
    seed: Seed = 0,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    json_: Json = False,
) -> None:
    """Attack the decoupled network on the fitting and test splits. Run again to go on after an interruption."""
    from attacks.recipes import recipes_named
    from attacks.stages import make_attacks
    from detector.bundle import Bundle

    chosen = recipes_named(recipes)
    opened = Bundle(bundle)
    splits = splits_of(opened.manifest.network.data, data_dir, image_size)
    with attack_bar("attack") as listen:
        rows = make_attacks(opened, splits, chosen, out, limit, seed, shard_images, listen)
    show("attacks on the test split (norms: medians over the images that fooled)", [asdict(row) for row in rows], json_)
