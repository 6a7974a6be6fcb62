"""`pathguard fit`, `calibrate` and `evaluate`: a detector on paths, its threshold, and its figures."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathguard.commands.options import (
    AttackDir,
    BundleDir,
    DataDir,
    ImageSize,
    Json,
    Rate,
    Ray,
    Seed,
    Trust,
    image_files,
    splits_of,
    workers_of,
)
from pathguard.tables import row_of, show

if TYPE_CHECKING:
    from detector.images import ImageSpec, Pixels
    from detector.scoring.choice import Candidate

log = logging.getLogger(__name__)

OVERSHOOT = {"yes": True, "no": False, "auto": None}
# The others stand on the page alone.
SHOWN = ("attacks", "worst_unseen", "false_alarms", "features", "baselines", "adaptive", "adaptive_baselines")


def fit(
    bundle: BundleDir,
    attacks: AttackDir,
    features: Annotated[
        str,
        typer.Option(help="What the classifier reads: bits, gates, ... joined by +, all, or auto to choose."),
    ] = "all",
    classifier: Annotated[str, typer.Option(help="Which classifier, such as logistic-0.01, or auto to choose.")] = (
        "logistic-0.01"
    ),
    fit_on: Annotated[
        str, typer.Option(help="Stored attacks to fit on: weak, strong, all, or recipes by commas.")
    ] = "all",
    overshoot: Annotated[
        str, typer.Option(help="Fit on attacks carried on past where they stopped, too: yes, no, or auto to choose.")
    ] = "no",
    benign: Annotated[
        bool, typer.Option("--benign", help="Fit on noise and common corruptions, too, as on images that are to pass.")
    ] = False,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Hold the false-alarm rate for each predicted class by itself.")
    ] = False,
    max_false_alarm_rate: Rate = 0.05,
    seed: Seed = 0,
    ray: Ray = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Fit and calibrate the detector on clean and attacked paths: the third stage.

    `auto` chooses features, classifier or overshoot on the fitting split, by attacks that are left out in turn.
    """
    from attacks.stages import make_detector
    from attacks.store import AttackStore
    from detector.bundle import Bundle
    from detector.memory import keep_freed_memory

    keep_freed_memory()
    if overshoot not in OVERSHOOT:
        raise typer.BadParameter(f"expected --overshoot of {', '.join(OVERSHOOT)}, got {overshoot!r}")
    opened = Bundle(bundle, trust)
    splits = splits_of(opened.manifest.network.data, data_dir, image_size)

    def listen(tried: "Candidate") -> None:
        what = tried.classifier + (", carried on," if tried.overshoot else "")
        figures = tried.mean, tried.worst, tried.seen
        log.info("%s on %s: unseen %.4f, worst %.4f, seen %.4f", what, tried.features, *figures)

    with workers_of(ray) as workers:
        grown = make_detector(
            opened, splits, AttackStore(attacks), features, max_false_alarm_rate, seed, classifier, fit_on, per_class,
            listen, workers, OVERSHOOT[overshoot], benign,
        )  # fmt: skip
    made = grown.manifest.training["detector"]
    facts = {"features": grown.detector_info().features, **made}
    show(f"detector in {bundle}", [{key: value for key, value in facts.items() if key != "candidates"}], json_)


def calibrate(
    images: Annotated[list[Path], typer.Argument(help="Clean images that nothing was fitted on, and folders of them.")],
    bundle: BundleDir,
    max_false_alarm_rate: Annotated[
        float | None, typer.Option(help="Share of clean images that may be flagged, in (0, 1); else as before.")
    ] = None,
    per_class: Annotated[
        bool | None, typer.Option(help="Hold the rate for each predicted class by itself; else as before.")
    ] = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Set the detector's threshold anew by clean images of yours; network and classifier stay.

    The promised rate of false alarms holds for images like those that it was calibrated on: where yours come from
    another camera than the training images, calibrate on some of yours. A running server takes the new threshold over.
    """
    from detector.bundle import Bundle
    from detector.scoring.recalibration import recalibrated

    opened = Bundle(bundle, trust)
    files = list(image_files(images))
    batches = _decoded(files, opened.manifest.network.spec)
    _, figures = recalibrated(opened, batches, max_false_alarm_rate, per_class)
    show(f"detector in {bundle}, calibrated on {len(files)} images", [row_of(figures)], json_)


def _decoded(files: list[Path], spec: "ImageSpec") -> Iterator["Pixels"]:
    """The images, in batches; none is passed over, since the worst ones are those that may not be missing."""
    import numpy as np

    from detector.errors import DataError, ImageError
    from detector.images import OWN_FILE_PIXELS, decode

    for first in range(0, len(files), 256):
        pixels = []
        for file in files[first : first + 256]:
            try:
                pixels.append(decode(file.read_bytes(), spec, OWN_FILE_PIXELS).pixels)
            except (ImageError, OSError) as error:
                raise DataError(f"{file}: {error}") from None
        yield np.stack(pixels)


def evaluate(
    bundle: BundleDir,
    attacks: AttackDir,
    protocol: Annotated[
        str, typer.Option(help="How much of everything: quick, full, larger, hardened or insistent.")
    ] = "quick",
    out: Annotated[Path | None, typer.Option(help="Folder for the report; else ATTACKS/evaluation.")] = None,
    adaptive: Annotated[bool, typer.Option(help="Let attackers loose who know the detector.")] = True,
    foreign: Annotated[
        str | None, typer.Option(help="Another data set for images of no known class; else handwritten digits.")
    ] = None,
    seed: Seed = 0,
    ray: Ray = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Judge the detector on images that no step has seen: tables, one page, pictures."""
    from attacks.evaluation.evaluate import evaluate_bundle
    from attacks.evaluation.protocol import protocol_named
    from attacks.evaluation.report import content_of, write_evaluation
    from attacks.store import AttackStore
    from detector.bundle import Bundle
    from detector.memory import keep_freed_memory

    keep_freed_memory()
    chosen, opened = protocol_named(protocol), Bundle(bundle, trust)
    splits = splits_of(opened.manifest.network.data, data_dir, image_size)
    strangers = splits_of(foreign, None, image_size).test if foreign is not None else None
    with workers_of(ray) as workers:
        found = evaluate_bundle(opened, splits, AttackStore(attacks), chosen, seed, strangers, adaptive, workers)
    page, *files = write_evaluation(found, out or attacks / "evaluation")
    if json_:
        print(json.dumps(content_of(found), indent=1))
        return
    for sheet in found.sheets:
        if sheet.name in SHOWN and sheet.rows:
            show(sheet.title, [dict(row) for row in sheet.rows])
    for note in found.notes:
        print(note)
    print(f"page: {page}")
    print(f"and {len(files)} tables and pictures beside it")
