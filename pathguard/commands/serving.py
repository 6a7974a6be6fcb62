"""What talks to a running server: `detect`, `bench` and `health`."""

import http.client
import os
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from pathguard.client import Client, ClientError, ImageResult, Verdict, check_health
from pathguard.commands.options import Json, Target
from pathguard.load import measure_load
from pathguard.tables import row_of, show

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Where a server listens on all addresses, it is asked on this one.
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - not bound to, but asked


def detect(
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders of them.")],
    target: Target = "127.0.0.1:50051",
    max_false_alarm_rate: Annotated[float | None, typer.Option(help="Rate for this call; else the bundle's.")] = None,
    timeout_seconds: Annotated[float, typer.Option(help="How long to wait for an answer.", min=0.001)] = 30.0,
    json_: Json = False,
) -> None:
    """Ask a running server for label and verdict; exit code 3 if an image is adversarial, 1 if one is bad."""
    files = list(_image_files(images))
    with Client(target) as client:
        results = client.detect(files, max_false_alarm_rate=max_false_alarm_rate, timeout_seconds=timeout_seconds)
    show(f"verdicts of {target}", [_verdict_row(*pair) for pair in zip(files, results, strict=True)], json_)
    if any(result.error for result in results):
        raise typer.Exit(1)
    if any(result.verdict is Verdict.ADVERSARIAL for result in results):
        raise typer.Exit(3)


def _verdict_row(file: Path, result: ImageResult) -> dict[str, object]:
    return {
        "file": str(file),
        "label": result.name,
        "verdict": None if result.error else result.verdict.name,
        "score": None if result.error else result.score,
        "p_value": None if result.error else result.p_value,
        "resized": None if result.error else result.resized,
        "error": result.error,
    }


def bench(
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders of them, sent in turn.")],
    target: Target = "127.0.0.1:50051",
    concurrency: Annotated[int, typer.Option(help="Calls under way at once.", min=1, max=256)] = 1,
    images_per_call: Annotated[int, typer.Option(help="Images in each call.", min=1, max=1024)] = 1,
    calls: Annotated[int, typer.Option(help="Calls in all.", min=1, max=1_000_000)] = 500,
    json_: Json = False,
) -> None:
    """Load a running server and print calls and images per second and latencies."""
    files = [file.read_bytes() for file in _image_files(images)]
    report = measure_load(target, files, concurrency=concurrency, images_per_call=images_per_call, calls=calls)
    show(f"load on {target}", [row_of(report)], json_)


def health(
    target: Annotated[str | None, typer.Option(help="Address of the server (default: this machine, its port).")] = None,
    timeout_seconds: Annotated[float, typer.Option(help="How long to wait for an answer.", min=0.001)] = 3.0,
) -> None:
    """Exit with 0 if a server answers and is ready, else with 1 (for containers).

    Beside a server with metrics (PATHGUARD_METRICS_PORT) it asks their /healthz, which needs no certificate.
    """
    port = os.environ.get("PATHGUARD_METRICS_PORT")
    if target is None and port:
        host = os.environ.get("PATHGUARD_METRICS_HOST", "127.0.0.1")
        target = f"{_ANYWHERE.get(host, host)}:{port}"
        ready = _healthz(target, timeout_seconds)
    else:
        target = target or f"127.0.0.1:{os.environ.get('PATHGUARD_PORT', 50051)}"
        ready = check_health(target, timeout_seconds)
    if not ready:
        raise ClientError(f"expected a server that is ready at {target}, got none")
    print(f"{target} is ready")


def _healthz(target: str, timeout_seconds: float) -> bool:
    try:
        connection = http.client.HTTPConnection(target, timeout=timeout_seconds)
        with closing(connection):
            connection.request("GET", "/healthz")
            return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False


def _image_files(paths: list[Path]) -> Iterable[Path]:
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
