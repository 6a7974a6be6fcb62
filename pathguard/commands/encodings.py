"""`pathguard encode`: images to path encodings, on disk."""

from pathlib import Path
from typing import Annotated

import typer

from pathguard.commands.options import (
    BundleDir,
    DataDir,
    ImageSize,
    Json,
    Ray,
    Trust,
    splits_of,
    workers_of,
)
from pathguard.progress import encode_bar
from pathguard.tables import row_of, show


def encode(
    bundle: BundleDir,
    out: Annotated[Path, typer.Option(help="Folder for the encodings; an unfinished one is finished.")],
    data: Annotated[
        str | None, typer.Option(help="Data set of the same classes; by default the one that it was trained on.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Which images of it: train, validation, fitting, calibration, test or held_out.")
    ] = "test",
    limit: Annotated[int | None, typer.Option(help="Encode the first N images only.", min=1)] = None,
    shard_images: Annotated[int, typer.Option(help="Images in memory at a time.", min=1)] = 1000,
    ray: Ray = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Write the calculation path of every image: which filters it opened. Run again to go on after an interruption."""
    from detector.bundle import Bundle
    from detector.memory import keep_freed_memory
    from detector.paths.encodings import make_encodings

    keep_freed_memory()
    opened = Bundle(bundle, trust)
    images = splits_of(data or opened.manifest.network.data, data_dir, image_size).named(split).first(limit)
    with workers_of(ray) as workers, encode_bar() as listen:
        figures = make_encodings(opened, images, split, out, shard_images, listen, workers)
    show(f"path encodings of {images.name}, {split}, in {out}", [row_of(figures)], json_)
