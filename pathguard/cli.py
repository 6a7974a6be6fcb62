"""The command `pathguard`: one verb for each step from images to verdicts.

Steps that need torch import it when they run, so that the client's commands work where only the client is installed.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from pathguard import __version__
from pathguard.client import Client, ClientError, ImageResult, Verdict, check_health
from pathguard.load import measure_load
from pathguard.progress import attack_bar, training_bar
from pathguard.tables import row_of, show

if TYPE_CHECKING:
    from attacks.stages import FeatureFigures
    from detector.datasets import Splits

app = typer.Typer(
    name="pathguard",
    help="Serve a CNN that answers with a label and the evidence against it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130  # what typer makes of Ctrl-C
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Data = Annotated[str, typer.Option(help="Data set: fashion-mnist, cifar10, or folder:PATH with a folder per class.")]
DataDir = Annotated[Path | None, typer.Option(help="Where the files of a named data set lie; else cache or download.")]
ImageSize = Annotated[int | None, typer.Option(help="Resize the images of a folder to this height and width.", min=8)]
BundleDir = Annotated[Path, typer.Option("--bundle", help="Folder of the bundle.", envvar="PATHGUARD_BUNDLE")]
AttackDir = Annotated[Path, typer.Option("--attacks", help="Folder that `pathguard attack` wrote.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random.", min=0)]
Rate = Annotated[float, typer.Option(help="Share of clean images that may be flagged, in (0, 1).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Target = Annotated[str, typer.Option(help="Address of the server, HOST:PORT.")]


def main() -> None:
    """Run the command; what goes wrong is told in one line, exit code 1 (2: wrong arguments, 130: Ctrl-C)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        # Not standalone: a mistake in the arguments then comes here too, for one line instead of a box.
        code = app(standalone_mode=False, prog_name="pathguard")
    except TyperException as error:
        if not error.format_message():  # no arguments at all: the help has been printed
            sys.exit(2)
        _fail(f"{error.format_message()} (see pathguard --help)", code=2)
    except ModuleNotFoundError as error:
        if error.name in {"service", "detector", "pathguard"}:
            raise
        _fail(f"expected the package {error.name}, got none; install pathguard[serve] or, to train, pathguard[train]")
    except Exception as error:
        if not _is_meant_for_people(error):
            raise
        _fail(str(error))
    if code == INTERRUPTED:
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _is_meant_for_people(error: Exception) -> bool:
    """Whether this is one of our own errors, looked up only in what is imported already."""
    known: list[type[Exception]] = [ClientError]
    for module, name in (("detector.errors", "DetectorError"), ("service.errors", "ServiceError")):
        if module in sys.modules:
            known.append(getattr(sys.modules[module], name))
    return isinstance(error, tuple(known))


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the new bundle.")],
    data: Data = "cifar10",
    network: Annotated[str, typer.Option(help="resnet8, resnet14, resnet20 or resnet56.")] = "resnet20",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 40,
    batch: Annotated[int, typer.Option(help="Images per step.", min=2)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 0.15,
    resize: Annotated[bool, typer.Option(help="Let the served network take images of any size.")] = False,
    flip: Annotated[bool, typer.Option(help="Mirror half of the training images.")] = True,
    limit: Annotated[int | None, typer.Option(help="Train on the first N images only.", min=1)] = None,
    seed: Seed = 0,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    json_: Json = False,
) -> None:
    """Train a plain backbone: the first stage of a bundle. Run again to go on after an interruption."""
    from detector.stages import make_backbone
    from detector.training import Schedule

    splits = _splits(data, data_dir, image_size)
    splits = replace(splits, train=splits.train.first(limit))
    schedule = Schedule(epochs, batch, learning_rate, flip=flip, seed=seed)
    with training_bar(f"train {network}") as listen:
        _, figures = make_backbone(network, splits, schedule, out, listen, resize)
    show(f"backbone {network} in {out}", [row_of(figures)], json_)


@app.command()
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
    from detector.stages import make_decoupled
    from detector.training import Schedule

    opened = Bundle(bundle)
    splits = _splits(opened.manifest.network.data, data_dir, image_size)
    splits = replace(splits, train=splits.train.first(limit))
    schedule = Schedule(epochs, batch, learning_rate, flip=flip, seed=seed)
    with training_bar("decouple") as listen:
        grown, figures = make_decoupled(opened, splits, keep, objective, schedule, out or bundle, listen)
    show(f"decoupled network in {grown.folder}", [row_of(figures)], json_)


@app.command()
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
    splits = _splits(opened.manifest.network.data, data_dir, image_size)
    with attack_bar("attack") as listen:
        rows = make_attacks(opened, splits, chosen, out, limit, seed, shard_images, listen)
    show("attacks on the test split (norms: medians over the images that fooled)", [asdict(row) for row in rows], json_)


@app.command()
def fit(
    bundle: BundleDir,
    attacks: AttackDir,
    features: Annotated[str, typer.Option(help="What the classifier reads: bits, gates, margins or all.")] = "all",
    max_false_alarm_rate: Rate = 0.05,
    seed: Seed = 0,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    json_: Json = False,
) -> None:
    """Fit and calibrate the detector on clean and attacked paths: the third stage."""
    from attacks.stages import make_detector
    from attacks.store import AttackStore
    from detector.bundle import Bundle

    opened = Bundle(bundle)
    splits = _splits(opened.manifest.network.data, data_dir, image_size)
    grown = make_detector(opened, splits, AttackStore(attacks), features, max_false_alarm_rate, seed)
    made = grown.manifest.training["detector"]
    show(f"detector in {bundle}", [{key: str(value) for key, value in made.items()}], json_)


@app.command()
def evaluate(
    bundle: BundleDir,
    attacks: AttackDir,
    max_false_alarm_rate: Rate = 0.05,
    each_feature: Annotated[bool, typer.Option(help="Also fit and judge each kind of features alone.")] = False,
    seed: Seed = 0,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    json_: Json = False,
) -> None:
    """Judge the detector on images that no step has seen."""
    from attacks.stages import judge_detector, judge_each_feature
    from attacks.store import AttackStore
    from detector.bundle import Bundle

    opened, store = Bundle(bundle), AttackStore(attacks)
    splits = _splits(opened.manifest.network.data, data_dir, image_size)
    judged = [judge_detector(opened, splits, store, max_false_alarm_rate, seed)]
    if each_feature:
        judged += judge_each_feature(opened, splits, store, store, max_false_alarm_rate, seed)
    if json_:
        show("", list(_detection_rows(judged)), as_json=True)
        return
    show(f"served detector ({judged[0].features}) first, successful attacks", list(_attack_rows(judged)))
    show(f"flagged clean images, {max_false_alarm_rate:.2%} allowed", list(_false_alarm_rows(judged)))


def _attack_rows(judged: "Iterable[FeatureFigures]") -> Iterable[dict[str, object]]:
    """For a person: how well each attack is told from clean images."""
    for figures in judged:
        for row in figures.detections:
            yield {
                "features": figures.features,
                "attack": row.attack,
                "images": row.attacked,
                "AUROC": row.auroc,
                "95 %": f"{row.auroc_low:.3f}-{row.auroc_high:.3f}",
                "detected": row.detected,
            }


def _false_alarm_rows(judged: "Iterable[FeatureFigures]") -> Iterable[dict[str, object]]:
    """For a person: how many clean images are flagged, and of those that the network gets wrong."""
    for figures in judged:
        alarms, wrong = figures.false_alarms, figures.false_alarms_when_wrong
        yield {
            "features": figures.features,
            "clean images": "all",
            "images": alarms.images,
            "flagged": alarms.realised,
            "expected": f"{alarms.low:.3f}-{alarms.high:.3f}",
            "as expected": alarms.as_expected,
        }
        if wrong is not None:  # no interval: images that the network gets wrong are not like those of the calibration
            yield {
                "features": figures.features,
                "clean images": "labelled wrongly",
                "images": wrong.images,
                "flagged": wrong.realised,
                "expected": None,
                "as expected": None,
            }


def _detection_rows(judged: "Iterable[FeatureFigures]") -> Iterable[dict[str, object]]:
    """For a program: one row per features and attack, with the false alarms on clean test images beside it."""
    for figures in judged:
        for row in figures.detections:
            yield {
                "features": figures.features,
                **asdict(row),
                "false_alarms": figures.false_alarms.realised,
                "expected_low": figures.false_alarms.low,
                "expected_high": figures.false_alarms.high,
                "alarms_when_wrong": figures.false_alarms_when_wrong and figures.false_alarms_when_wrong.realised,
                "wrong": figures.false_alarms_when_wrong.images if figures.false_alarms_when_wrong else 0,
            }


@app.command()
def serve(
    bundle: BundleDir,
    host: Annotated[str | None, typer.Option(help="Address to listen on [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes any free one [default: 50051].")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Images in a forward pass [default: 32].")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the model [default: all cores].", envvar="PATHGUARD_THREADS", min=1)
    ] = None,
    allow_insecure: Annotated[bool, typer.Option(help="Listen beyond this machine without TLS.")] = False,
) -> None:
    """Serve a bundle over gRPC until SIGTERM or Ctrl-C. Every setting is also a variable PATHGUARD_..."""
    # As a container's first process, SIGTERM would do nothing until the server's event loop listens for it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    import torch

    from detector.bundle import Bundle
    from detector.scoring import Detector
    from service.config import ServiceConfig
    from service.server import run

    given = {"host": host, "port": port, "max_batch": max_batch, "allow_insecure": allow_insecure or None}
    config = ServiceConfig.from_environ(
        {
            **os.environ,
            **{f"PATHGUARD_{name.upper()}": str(value) for name, value in given.items() if value is not None},
        }
    )
    if threads is not None:
        torch.set_num_threads(threads)
    detector = Detector(Bundle(bundle))
    run(detector, config, on_ready=lambda bound: print(f"serving {detector.name} on {config.host}:{bound}", flush=True))


@app.command()
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


@app.command()
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


@app.command()
def health(
    target: Annotated[str | None, typer.Option(help="Address of the server [default: this machine, its port].")] = None,
    timeout_seconds: Annotated[float, typer.Option(help="How long to wait for an answer.", min=0.001)] = 3.0,
) -> None:
    """Exit with 0 if a server answers and is ready, else with 1 (for containers)."""
    target = target or f"127.0.0.1:{os.environ.get('PATHGUARD_PORT', 50051)}"
    if not check_health(target, timeout_seconds):
        _fail(f"expected a server that is ready at {target}, got none")
    print(f"{target} is ready")


def _splits(data: str, data_dir: Path | None, image_size: int | None) -> "Splits":
    from detector.datasets import load_splits

    return load_splits(data, data_dir, image_size)


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
