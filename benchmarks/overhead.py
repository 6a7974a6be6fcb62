"""Label and verdict against the plain forward pass of the same backbone, both in torch eager, same threads.

    python -m benchmarks.overhead [--threads N] [--quick] [--json FILE]

Weights are fresh: time does not depend on them. The plain side takes a ready tensor and gives logits; our side takes
8-bit pixels and gives labels, probabilities, scores, p-values and paths. Our side has its batch normalisations folded
into the convolutions, as it is served; the plain side is measured as it was trained (the bar) and folded too, by
torch's own tool. Repetitions are interleaved.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.fx.experimental.optimization import fuse

from benchmarks.report import Row, print_rows, write_rows
from benchmarks.timing import interleaved
from detector.batches import to_tensor
from detector.bundle import (
    Bundle,
    DetectorInfo,
    GatesInfo,
    NetworkInfo,
    add_detector,
    add_network,
    add_usual_paths,
    begin_bundle,
)
from detector.images import ImageSpec, Pixels
from detector.interpretation.usual_paths import UsualPathsBuilder
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.paths.encoder import encode
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import features_named
from detector.scoring.classifier import default_estimator
from detector.scoring.detector import Detector
from detector.scoring.thresholds import Calibration

BARS = {1: 1.6, 32: 1.25}
NETWORKS = ("resnet20", "resnet56", "resnet8")


def main(
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
    quick: Annotated[bool, typer.Option(help="Under a minute.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = []
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            detector, plain = _fresh(name, Path(folder))
        folded = fuse(plain)
        for batch, bar in BARS.items():
            pixels = np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
            repetitions = max(5, (300 if quick else 2000) // batch) // (4 if name == "resnet56" else 1) + 5
            calls = (_ours(detector, pixels), _plain(plain, pixels), _plain(folded, pixels))
            ours, theirs, theirs_folded = interleaved(calls, repetitions)
            held = bar if name == "resnet20" else None
            rows += [
                Row(
                    figure=f"{name}, batch {batch}: label and verdict / plain forward",
                    value=ours / theirs,
                    bar=held,
                ),
                Row(figure=f"{name}, batch {batch}: the same / plain forward, folded", value=ours / theirs_folded),
                Row(figure=f"{name}, batch {batch}: plain forward pass, ms", value=1000 * theirs),
            ]
    print_rows(f"32 x 32 RGB, {threads} thread(s), medians of interleaved repetitions", rows)
    if json is not None:
        write_rows(json, rows)


def _fresh(name: str, folder: Path) -> tuple[Detector, torch.nn.Module]:
    """A detector with fresh weights, and its plain backbone."""
    bundle = fresh_bundle(name, folder)
    return Detector(bundle, engine="masked"), bundle.backbone()


def fresh_bundle(name: str, folder: Path, with_statistics: bool = False) -> Bundle:
    """A bundle with fresh weights and a detector of nothing, for images of 32 x 32 RGB.

    Args:
        name: of the network.
        folder: where it is written.
        with_statistics: whether it holds statistics of paths, those of random images.
    """
    spec, classes = ImageSpec(32, 32, 3), tuple("abcdefghij")
    backbone = build_network(name, 3, len(classes)).eval()
    network = decouple(backbone).eval()
    bundle = begin_bundle(folder, NetworkInfo(name, classes, spec, "none", "none"), backbone, {})
    bundle = add_network(bundle, folder, GatesInfo(0.7, True, "pathguard"), network, {})
    evidence = encode(network, torch.rand(60, 3, 32, 32))
    rows = rows_of(evidence)
    features = features_named("all", EvidenceShape.of(evidence)).fit(rows)
    classifier = default_estimator().fit(features.transform(rows), np.arange(60) % 2)
    info = DetectorInfo("+".join(features.kinds), 0.05, ())
    bundle = add_detector(bundle, info, classifier, Calibration(np.arange(3000.0)), {}, features.arrays())
    if with_statistics:
        builder = UsualPathsBuilder(network.layers, len(classes))
        builder.add(evidence.path, np.arange(60) % len(classes), np.arange(60))
        bundle = add_usual_paths(bundle, builder.built(), {})
    return Bundle(folder)


def _ours(detector: Detector, pixels: Pixels) -> Callable[[], object]:
    return lambda: detector.detect(pixels)


def _plain(backbone: torch.nn.Module, pixels: Pixels) -> Callable[[], object]:
    images = to_tensor(pixels, torch.device("cpu"))

    def forward() -> object:
        with torch.inference_mode():
            return backbone(images)

    return forward


if __name__ == "__main__":
    typer.run(main)
