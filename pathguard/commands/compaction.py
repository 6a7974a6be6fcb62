"""`pathguard compact`: a smaller bundle with the same answers, for serving."""

from pathlib import Path
from typing import Annotated

import typer

from pathguard.commands.options import DataDir, ImageSize, Json, Trust, splits_of
from pathguard.tables import row_of, show


def compact(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle with a detector.")],
    out: Annotated[Path, typer.Option(help="Folder of the compacted bundle.")],
    attacks: Annotated[
        Path | None, typer.Option(help="Folder that `pathguard attack` wrote: what its images open stays too.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Look at the first N images of each split only.", min=1)] = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Write a bundle that is served without the filters that no training or fitting image opens.

    Labels, paths and verdicts stay the same: an image that opens such a filter is answered by the full network, and
    counted. The backbone, which serving does not need, is left out.
    """
    from attacks.compaction import make_compact
    from attacks.store import AttackStore
    from detector.bundle import Bundle

    opened = Bundle(bundle, trust)
    splits = splits_of(opened.manifest.network.data, data_dir, image_size)
    _, figures = make_compact(opened, splits, None if attacks is None else AttackStore(attacks), out, limit)
    show(f"compacted bundle in {out}", [row_of(figures)], json_)
