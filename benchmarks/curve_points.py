"""Accuracy against multiply-accumulates and milliseconds: the networks that benchmarks/curves.py trains, measured.

Every network is timed beside the plain backbone, batch 1, in turns; ours in the engine that would serve it, without the
verdict (only the bundle that was started from has a detector), the pruned ones in the best engine of the plain
backbone. Accuracy is that of all test images. Which pruned network is as accurate as a decoupled one is decided on the
validation images.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.curves import decoupled_bundles, pruned_networks
from benchmarks.plain import CPU, EAGER, ONNX, each_image, plain_sides
from benchmarks.pruned import macs
from benchmarks.timing import interleaved
from detector.bundle import Bundle
from detector.datasets import ImageSet, load_splits
from detector.engines.choice import Agreement, agreement_of, choose_engine
from detector.engines.engine import Answers
from detector.engines.masked import MaskedEngine
from detector.images import Pixels
from detector.network.macs import cost_of
from detector.network.training import accuracy
from detector.paths.encoder import Evidence

PLAIN, OURS, STATIC = "plain", "decoupled", "pruned"
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Point:
    """One network on the curves.

    Attributes:
        kind: `plain`, `decoupled` or `pruned`.
        keep: share of filters that was asked for: of all gated ones, or of the first ones of each block.
        accuracy: share of right labels among all test images, in percent.
        macs: multiply-accumulates of an image on average, gates included, in percent of the plain network's.
        ms: milliseconds for one image.
        equal: share kept by the most pruned network that is as accurate on the validation images; None for others than
            decoupled ones, and where none is.
    """

    kind: str
    keep: float
    accuracy: float
    macs: float
    ms: float
    equal: float | None = None


@dataclass(frozen=True, slots=True)
class Curves:
    """All networks, and how exact the engines were on them.

    Attributes:
        points: the plain network, the decoupled ones, the pruned ones, each by falling share kept.
        labels: least share, in percent, of labels equal to the masked network's, over the decoupled networks.
        unsure_bits: bits of all their paths that differ and may.
        wrong_bits: bits that differ and may not.
    """

    points: tuple[Point, ...]
    labels: float
    unsure_bits: int
    wrong_bits: int

    def of(self, kind: str) -> list[Point]:
        """The points of a kind."""
        return [point for point in self.points if point.kind == kind]

    def ours_over_static(self, keep: float) -> float | None:
        """Milliseconds of the decoupled network over those of the pruned one that is as accurate; None without one."""
        ours = next((point for point in self.of(OURS) if point.keep == keep), None)
        if ours is None or ours.equal is None:
            return None
        return ours.ms / next(point for point in self.of(STATIC) if point.keep == ours.equal).ms


def measure(start: Bundle, work: Path, data_dir: Path | None, repetitions: int = 300) -> Curves:
    """Measure `start` and what `work` holds of networks made of it.

    Raises:
        ArtifactError: a network in `work` was made of another bundle.
        DataError: the bundle's data cannot be had.
    """
    splits = load_splits(start.manifest.network.data, data_dir)
    bundles, static, backbone = decoupled_bundles(start, work), pruned_networks(start, work), start.backbone()
    spec = start.manifest.network.spec
    image = torch.zeros(1, spec.channels, spec.height, spec.width)
    pool = splits.held_out.pixels(slice(0, 64))
    networks = [bundle.network() for bundle in bundles]
    engines = [choose_engine(network, spec, None, CPU) for network in networks]
    calls = [_best_call(backbone, pool), *(engine.answer for engine in engines)]
    calls += [_best_call(made.network, pool) for made in static]
    seconds = interleaved([each_image(call, pool) for call in calls], repetitions)
    plain, ours, others = seconds[0], seconds[1 : 1 + len(engines)], seconds[1 + len(engines) :]

    dense = macs(backbone, image)
    points = [Point(PLAIN, 1.0, 100 * accuracy(backbone, splits.held_out), 100.0, 1000 * plain)]
    found: list[Agreement] = []
    for bundle, network, engine, taken in zip(bundles, networks, engines, ours, strict=True):
        _say(f"{bundle.folder.name}: all test images, in {engine.name} and masked")
        evidence = _evidence(engine.answer, splits.held_out)
        found.append(agreement_of(evidence, _evidence(MaskedEngine(network, CPU).answer, splits.held_out)))
        validated = _right(_evidence(engine.answer, splits.validation), splits.validation)
        left = float(cost_of(network, image).of(evidence.path).mean()) / dense
        equal = [made.keep for made in static if made.validated >= validated]
        right, least = 100 * _right(evidence, splits.held_out), min(equal, default=None)
        points.append(Point(OURS, _keep(bundle), right, 100 * left, 1000 * taken, least))
    for made, taken in zip(static, others, strict=True):
        right = 100 * accuracy(made.network, splits.held_out)
        points.append(Point(STATIC, made.keep, right, 100 * macs(made.network, image) / dense, 1000 * taken))
    return Curves(
        tuple(points),
        labels=100 * min(agreement.labels for agreement in found),
        unsure_bits=sum(agreement.unsure_bits for agreement in found),
        wrong_bits=sum(agreement.wrong_bits for agreement in found),
    )


def table_of(curves: Curves) -> list[Mapping[str, object]]:
    """The points as rows for a person."""
    names = {"macs": "MACs left, %", "accuracy": "accuracy, %", "equal": "as accurate when pruned to"}
    return [{names.get(name, name): value for name, value in asdict(point).items()} for point in curves.points]


def _best_call(network: nn.Module, pool: Pixels) -> Callable[[Pixels], object]:
    sides = plain_sides(network.eval(), pool[:1], compiled=False)
    return sides.get(ONNX, sides[EAGER])


def _evidence(answer: Callable[[Pixels], Answers], images: ImageSet) -> Evidence:
    parts = (answer(images.pixels(slice(i, i + _BATCH))) for i in range(0, len(images), _BATCH))
    found = Evidence.stacked(part.evidence for part in parts)
    assert found is not None  # no set of images is empty
    return found


def _right(evidence: Evidence, images: ImageSet) -> float:
    return float((evidence.class_logits.argmax(axis=1) == images.labels).mean())


def _keep(bundle: Bundle) -> float:
    gates = bundle.manifest.gates
    assert gates is not None
    return gates.keep


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
