"""The main job on real images: train, decouple, attack, fit, serve, detect; then a table of what was measured.

    python -m benchmarks.demo [--out DIR] [--seed N] [--quick] [--json FILE]

Fashion-MNIST (or `--data cifar10 --data-dir DIR`). The network is trained on the training images, the detector fitted
on one part of the test images and calibrated on a second; the table is measured on the third, over gRPC, with attacks
crafted afresh. `--quick` takes fewer images and steps; its figures are not held against the bars.
"""

import logging
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from attacks.recipes import RECIPES
from attacks.stages import auroc_by_features, make_attacks, make_detector
from attacks.store import AttackStore
from benchmarks.report import Row, print_rows, write_rows
from benchmarks.server import server_process
from detector.bundle import Bundle
from detector.datasets import Splits, describe, load_splits
from detector.images import Pixels, encode_png
from detector.network.schedule import DECOUPLING, Schedule
from detector.paths.path_encoding import PathEncoding
from detector.pictures import draw_path_pair
from detector.scoring.evaluation import DetectionFigures, FalseAlarmFigures, detection_figures, false_alarm_figures
from detector.scoring.thresholds import Scores
from detector.stages import DecoupledFigures, make_backbone, make_decoupled
from pathguard.client import Client
from pathguard.progress import attack_bar, training_bar
from pathguard.tables import show

RATE = 0.05
ATTACKS = ("fgsm", "pgd", "pgd-l2")
STEPS = 8


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything.

    Attributes:
        network: name of the backbone.
        train: training images; None for all.
        backbone: its schedule.
        gates: the schedule of decoupling.
        attacked: images attacked per attack and split.
    """

    network: str
    train: int | None
    backbone: Schedule
    gates: Schedule
    attacked: int


FULL: Mapping[str, Size] = {
    "fashion-mnist": Size("resnet8", None, Schedule(3, learning_rate=0.2), Schedule(3, learning_rate=0.05), 1500),
    "cifar10": Size("resnet20", None, Schedule(40, learning_rate=0.15), DECOUPLING, 4000),
}


def main(
    out: Annotated[Path, typer.Option(help="Folder for all results; an earlier run's are removed.")] = Path("out/demo"),
    data: Annotated[str, typer.Option(help="fashion-mnist or cifar10.")] = "fashion-mnist",
    data_dir: Annotated[Path | None, typer.Option(help="Where the data set lies; else cache or download.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other numbers.", min=0)] = 0,
    quick: Annotated[bool, typer.Option(help="Under a minute.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
) -> None:
    """Run all steps and print the tables."""
    began = time.perf_counter()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if data not in FULL:
        raise typer.BadParameter(f"expected data of {', '.join(FULL)}, got {data}")
    size = FULL[data]
    if quick:
        size = replace(size, train=3000, backbone=replace(size.backbone, epochs=1), attacked=200)
        size = replace(size, gates=replace(size.gates, epochs=1))
    for made in ("bundle", "attacks", "fresh"):  # nothing else: the folder is the user's
        shutil.rmtree(out / made, ignore_errors=True)

    _step(1, "images")
    splits = load_splits(data, data_dir)
    splits = replace(splits, train=splits.train.first(size.train))
    if quick:
        fewer = ("validation", "fitting", "calibration", "test", "held_out")
        splits = replace(splits, **{name: splits.named(name).first(600) for name in fewer})
    print(f"train on {describe(splits.train)}; test on {len(splits.held_out)} others")

    bundle, figures = _make_networks(splits, size, seed, out / "bundle")

    _step(4, "attack the decoupled network")
    recipes = [RECIPES[name] for name in ATTACKS]
    with attack_bar("attack") as listen:
        make_attacks(bundle, splits, recipes, out / "attacks", size.attacked, seed, 250, listen, ("fitting",))

    _step(5, "fit and calibrate the classifier on the paths")
    store = AttackStore(out / "attacks")
    bundle = make_detector(bundle, splits, store, "all", RATE, seed)
    print(f"wrote the bundle {bundle.folder}")

    _step(6, "craft fresh attacks on test images")
    with attack_bar("attack") as listen:
        crafted = make_attacks(bundle, splits, recipes, out / "fresh", size.attacked, seed + 1, 250, listen, ("test",))
    fresh = AttackStore(out / "fresh")

    _step(7, "serve, and send clean and attacked images over gRPC")
    with server_process(bundle.folder) as (_, target), Client(target) as client:
        print(f"a server answers at {target}")
        clean = _scores(client, splits.test.pixels(slice(None)))
        attacked = {recipe: _scores(client, _fooling(fresh, recipe)) for recipe in ATTACKS}
        picture = _draw(client, splits, fresh, out / "paths.png")

    _step(8, "what was measured")
    calibration = bundle.calibration()
    alarms = false_alarm_figures(clean, calibration, RATE)
    served = [
        {
            "attack": made.recipe,
            "fooled": made.fooled,
            **_columns(detection_figures(made.recipe, clean, attacked[made.recipe], calibration, RATE, seed)),
            "alarms": alarms.realised,
            "expected": f"{alarms.low:.3f}-{alarms.high:.3f}",
        }
        for made in crafted
    ]
    title = f"over gRPC: {len(clean)} clean and {crafted[0].images} attacked test images, unseen by all training"
    show(f"{title};\nflagged where at most {RATE:.0%} of clean images would be", served)
    judged = auroc_by_features(bundle, splits, store, fresh, seed)
    by_features = [{"features": features, **of_attacks} for features, of_attacks in judged.items()]
    show("AUROC by what the classifier reads, same images", by_features)
    rows = _rows(figures, judged["bits"], alarms, (time.perf_counter() - began) / 60, quick)
    print_rows(f"{data}, {size.network}, seed {seed}, {len(splits.train)} training images", rows)
    print(f"picture of two paths: {picture}")
    if json is not None:
        write_rows(json, rows)


def _make_networks(splits: Splits, size: Size, seed: int, folder: Path) -> tuple[Bundle, DecoupledFigures]:
    _step(2, f"train the backbone {size.network}")
    with training_bar("train") as listen:
        bundle, _ = make_backbone(size.network, splits, replace(size.backbone, seed=seed), folder, listen)
    _step(3, "decouple it: put gates in front of its convolutions and train them")
    with training_bar("decouple") as listen:
        bundle, figures = make_decoupled(
            bundle, splits, 0.7, "pathguard", replace(size.gates, seed=seed), folder, listen
        )
    print(
        f"accuracy {figures.gates.accuracy:.4f} (backbone {figures.backbone_accuracy:.4f}) on {figures.images} test "
        f"images; {figures.gates.keep_ratio:.2f} of {figures.path_length} filters open, {figures.macs_left:.2f} of the "
        "multiply-accumulates left"
    )
    return bundle, figures


def _scores(client: Client, pixels: Pixels) -> Scores:
    """The server's score of each image, sent as a PNG file."""
    results = client.detect([encode_png(image) for image in pixels], timeout_seconds=120)
    bad = [result.error for result in results if result.error]
    if bad:
        raise RuntimeError(f"expected a score for every image, got {bad[0]}")
    return np.array([result.score for result in results])


def _fooling(store: AttackStore, recipe: str) -> Pixels:
    """The stored test images of a recipe that fooled the network."""
    return np.concatenate([shard.crafted.pixels[shard.crafted.fooled] for shard in store.read("test", recipe)])


def _draw(client: Client, splits: Splits, store: AttackStore, file: Path) -> Path:
    """A clean image, its attacked twin, and their paths, as the server sees them: the twin of the median score."""
    shard = next(store.read("test", "pgd"))
    fooled = np.flatnonzero(shard.crafted.fooled)
    scores = _scores(client, shard.crafted.pixels[fooled])
    position = int(fooled[np.argsort(scores)[len(scores) // 2]])
    clean = splits.test.read(shard.ids[position : position + 1])[0]
    twin = shard.crafted.pixels[position]
    results = client.detect([encode_png(clean), encode_png(twin)], include_path=True)
    paths = [result.path for result in results]
    assert paths[0] is not None
    assert paths[1] is not None
    encoding = PathEncoding.side_by_side({name: np.stack([paths[0][name], paths[1][name]]) for name in paths[0]})
    titles = tuple(
        f"{kind}: {result.name}, {result.verdict.name.lower()}, p = {result.p_value:.4f}"
        for kind, result in zip(("clean", "attacked by PGD"), results, strict=True)
    )
    draw_path_pair(file, clean, twin, encoding, (titles[0], titles[1]), "calculation paths")
    return file


def _columns(figures: DetectionFigures) -> dict[str, object]:
    return {
        "AUROC": figures.auroc,
        "95 %": f"{figures.auroc_low:.3f}-{figures.auroc_high:.3f}",
        "detected": figures.detected,
    }


def _rows(
    figures: DecoupledFigures, bits: Mapping[str, float], alarms: FalseAlarmFigures, minutes: float, quick: bool
) -> list[Row]:
    lost = 100 * (figures.backbone_accuracy - figures.gates.accuracy)

    def full(value: float) -> float | None:
        return None if quick else value

    return [
        Row(figure="FGSM 8/255, AUROC on path bits alone", value=full(bits["fgsm"]), bar=0.90, at_most=False),
        Row(figure="PGD 8/255, AUROC on path bits alone", value=full(bits["pgd"]), bar=0.90, at_most=False),
        Row(figure="accuracy below the backbone, points", value=full(lost), bar=3.0),
        Row(
            figure="false alarms at 5 %, at least",
            value=full(alarms.realised),
            bar=alarms.low,
            at_most=False,
        ),
        Row(figure="false alarms at 5 %, at most", value=full(alarms.realised), bar=alarms.high),
        Row(figure="minutes, without the installation", value=full(minutes), bar=8.0),
    ]


def _step(number: int, title: str) -> None:
    Console().rule(f"step {number} of {STEPS}: {title}", align="left")


if __name__ == "__main__":
    typer.run(main)
