"""Options that several commands share, and the data set that they name.

Steps that need torch import it when they run, so that the client's commands work where only the client is installed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from detector.datasets import Splits
    from detector.workers import Workers

Data = Annotated[str, typer.Option(help="Data set: fashion-mnist, cifar10, or folder:PATH with a folder per class.")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Where the files of a named data set lie; else cache or download.", envvar="PATHGUARD_DATA_DIR"),
]
ImageSize = Annotated[int | None, typer.Option(help="Resize the images of a folder to this height and width.", min=8)]
BundleDir = Annotated[Path, typer.Option("--bundle", help="Folder of the bundle.", envvar="PATHGUARD_BUNDLE")]
AttackDir = Annotated[Path, typer.Option("--attacks", help="Folder that `pathguard attack` wrote.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random.", min=0)]
Rate = Annotated[float, typer.Option(help="Share of clean images that may be flagged, in (0, 1).")]
Trust = Annotated[
    str | None,
    typer.Option(
        help="package.module:function that builds the bundle's network and whose code may run.",
        envvar="PATHGUARD_TRUST",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Work on a Ray cluster: auto, HOST:PORT, or local for all processors of this machine.",
        envvar="PATHGUARD_RAY",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Target = Annotated[str, typer.Option(help="Address of the server, HOST:PORT.", envvar="PATHGUARD_TARGET")]
Token = Annotated[str | None, typer.Option(help="Sent with every call.", envvar="PATHGUARD_TOKEN", show_envvar=True)]
Tls = Annotated[bool, typer.Option("--tls", help="Encrypt, and check the server's certificate.")]
Ca = Annotated[Path | None, typer.Option(help="PEM file of authorities to check it with; implies --tls.")]
Certificate = Annotated[Path | None, typer.Option(help="PEM file with the client's own certificate; implies --tls.")]
Key = Annotated[Path | None, typer.Option(help="PEM file with its private key.")]
AllowInsecure = Annotated[
    bool, typer.Option("--allow-insecure", help="Send the token to another machine without encryption.")
]


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def splits_of(data: str, data_dir: Path | None, image_size: int | None) -> "Splits":
    """The splits of a named data set or of a folder."""
    from detector.datasets import load_splits

    return load_splits(data, data_dir, image_size)


@contextmanager
def workers_of(ray: str | None) -> "Iterator[Workers]":
    """Who does the work: this process, or those of a Ray cluster, which is not imported without one."""
    from detector.workers import IN_PROCESS

    if ray is None:
        yield IN_PROCESS
        return
    from cluster.ray_workers import ray_workers

    with ray_workers(ray) as workers:
        yield workers


def image_files(paths: list[Path]) -> Iterable[Path]:
    """The files, and the images of each folder in the order of their names."""
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise typer.BadParameter(f"expected images ({', '.join(IMAGE_SUFFIXES)}) in {path}, got none")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise typer.BadParameter(f"expected an image file or a folder, got no {path}")
