"""What talks to a running server: `detect`, `bench` and `health`."""

import http.client
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from pathguard.client import Access, Client, ClientError, ImageResult, Verdict, check_health
from pathguard.commands.options import AllowInsecure, Ca, Certificate, Json, Key, Target, Tls, Token, image_files
from pathguard.load import Steady, measure_load
from pathguard.progress import detect_bar
from pathguard.tables import row_of, show

# From here on files go over one stream, and a bar tells how far it is.
MANY_FILES = 100
# Where a server listens on all addresses, it is asked on this one.
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - not bound to, but asked


def detect(
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders of them.")],
    target: Target = "127.0.0.1:50051",
    model: Annotated[str, typer.Option(help="Model to ask (default: the server's).", show_default=False)] = "",
    max_false_alarm_rate: Annotated[float | None, typer.Option(help="Rate for this call; else the bundle's.")] = None,
    uncertain_rate: Annotated[
        float | None, typer.Option(help="Call images uncertain that would be flagged at this larger rate only.")
    ] = None,
    correct: Annotated[
        bool, typer.Option("--correct", help="Also say what each adversarial image most likely shows (a guess).")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help=f"One stream, with a bar (default: beyond {MANY_FILES} files)."),
    ] = None,
    timeout_seconds: Annotated[float, typer.Option(help="How long to wait for an answer.", min=0.001)] = 30.0,
    token: Token = None,
    tls: Tls = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    allow_insecure: AllowInsecure = False,
    json_: Json = False,
) -> None:
    """Ask a running server for label and verdict; exit code 3 if an image is adversarial, 1 if one is bad."""
    files = list(image_files(images))
    access = Access(tls=tls, ca=ca, certificate=certificate, key=key, token=token, allow_insecure=allow_insecure)
    asked: dict[str, Any] = {
        "model": model,
        "max_false_alarm_rate": max_false_alarm_rate,
        "uncertain_rate": uncertain_rate,
        "correct": correct,
        "timeout_seconds": timeout_seconds,
    }
    with Client(target, access=access) as client:
        if len(files) > MANY_FILES if stream is None else stream:
            results = _streamed(client.detect_stream(files, **asked), len(files))
        else:
            results = client.detect(files, **asked)
    rows = [_verdict_row(*pair) for pair in zip(files, results, strict=True)]
    if correct:
        rows = [{**row, "restored": result.restored_name} for row, result in zip(rows, results, strict=True)]
    show(f"verdicts of {target}", rows, json_)
    if any(result.error for result in results):
        raise typer.Exit(1)
    if any(result.verdict is Verdict.ADVERSARIAL for result in results):
        raise typer.Exit(3)


def _streamed(answers: Iterator[tuple[int, ImageResult]], count: int) -> list[ImageResult]:
    """The results of a stream in the order of the files."""
    results: dict[int, ImageResult] = {}
    adversarial = bad = 0
    with detect_bar() as update:
        for position, result in answers:
            results[position] = result
            adversarial += result.verdict is Verdict.ADVERSARIAL
            bad += result.error is not None
            update(len(results), count, adversarial, bad)
    return [results[position] for position in range(count)]


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
    concurrency: Annotated[
        str | None, typer.Option(help="Calls under way at once: 4, or a range START:END:STEP (default: 1).")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Calls sent each second whether answers come or not: 50, or a range START:END:STEP."),
    ] = None,
    images_per_call: Annotated[int, typer.Option(help="Images in each call.", min=1, max=1024)] = 1,
    calls: Annotated[
        int | None, typer.Option(help="Calls in all (default: until it is steady).", min=1, max=1_000_000)
    ] = None,
    window_seconds: Annotated[float, typer.Option(help="Length of a window.", min=0.01, max=600)] = 2.0,
    tolerance: Annotated[
        float, typer.Option(help="Steady: three windows within this share of their mean.", min=0.001, max=1)
    ] = 0.1,
    max_windows: Annotated[int, typer.Option(help="Windows after which to give up.", min=3, max=1000)] = 15,
    token: Token = None,
    tls: Tls = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    allow_insecure: AllowInsecure = False,
    json_: Json = False,
) -> None:
    """Load a running server, and print calls and images per second and latencies.

    Each load goes on until calls per second and median latency of the last three windows are within the tolerance of
    their mean; those three windows are what is printed. With --rate, latency counts from when a call was due.
    """
    if concurrency is not None and rate is not None:
        raise typer.BadParameter("expected --concurrency or --rate, got both")
    files = [file.read_bytes() for file in image_files(images)]
    settings: dict[str, Any] = {
        "images_per_call": images_per_call,
        "calls": calls,
        "steady": None
        if calls
        else Steady(window_seconds=window_seconds, tolerance=tolerance, most_windows=max_windows),
        "access": Access(tls=tls, ca=ca, certificate=certificate, key=key, token=token, allow_insecure=allow_insecure),
    }
    if rate is not None:
        reports = [measure_load(target, files, rate=value, **settings) for value in _range(rate, "--rate")]
    else:
        callers = _range("1" if concurrency is None else concurrency, "--concurrency")
        if any(value != int(value) for value in callers):
            raise typer.BadParameter(f"expected --concurrency of whole numbers, got {concurrency!r}")
        reports = [measure_load(target, files, concurrency=int(value), **settings) for value in callers]
    rows = [row_of(report) for report in reports]
    show(f"load on {target}", rows if json_ else [_load_row(row) for row in rows], json_)


def _range(text: str, option: str) -> list[float]:
    """`4`, `1:8` or `1:9:2` as numbers above 0, the end included."""
    try:
        numbers = [float(part) for part in text.split(":")]
        start, end, step = [*numbers, numbers[0], 1.0][:3] if len(numbers) == 1 else [*numbers, 1.0][:3]
    except (ValueError, IndexError):
        start = end = step = 0.0
    if not (0 < start <= end and step > 0 and len(text.split(":")) <= 3 and (end - start) / step < 1000):
        raise typer.BadParameter(f"expected {option} of NUMBER or START:END[:STEP], above 0, got {text!r}")
    return [start + number * step for number in range(int((end - start) / step + 1e-9) + 1)]


def _load_row(row: Mapping[str, Any]) -> dict[str, object]:
    """A row that fits a terminal; `--json` has all of it."""
    level = "concurrency" if row["rate"] is None else "rate"
    names = ("calls_per_second", "images_per_second", "p50_milliseconds", "p90_milliseconds", "p99_milliseconds")
    return {
        level: f"{row[level]:g}",
        **{name.replace("_per_second", "/s").replace("milliseconds", "ms"): _figure(row[name]) for name in names},
        "errors": row["errors"],
        "steady": row["steady"],
    }


def _figure(value: float) -> str:
    return f"{value:6.2f}" if value < 100 else f"{value:6.0f}"


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
