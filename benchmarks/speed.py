"""Label and verdict against the label alone: is the network with its detector faster than without?

    python -m benchmarks.speed [--only NETWORK] [--threads N] [--quick] [--json FILE]
                               [--bundle DIR --data-dir DIR] [--picture FILE]

Each network is decoupled at a keep ratio of 0.6 with fresh weights, its normalisations settled on made-up images, so
that about that share of the filters opens and depends on the image; time does not depend on whether labels are right.
The plain side takes a ready tensor and gives logits, in torch eager, torch.compile and ONNX Runtime; ours takes 8-bit
pixels and gives labels, probabilities, scores, p-values and paths. Repetitions are interleaved, each on another image.
A network whose filters are cut to as many multiply-accumulates, the same for all images, stands beside: what static
pruning would give, at whatever accuracy.

With a trained bundle its labels are held against the masked network's on the test images, and it is a point of the
table (and picture) of accuracy against multiply-accumulates and milliseconds; `--bundle` may be given again.
"""

import copy
import itertools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from benchmarks.onnx_sessions import onnx_call
from benchmarks.overhead import interleaved
from benchmarks.report import Row, print_rows, write_rows
from detector.batches import to_tensor
from detector.bundle import Bundle
from detector.datasets import load_splits
from detector.engines.choice import Choice, agreement_of, choose_engine, smooth_images
from detector.engines.engine import Engine
from detector.engines.kernel import KernelEngine
from detector.engines.kernel_score import KernelScore
from detector.engines.masked import MaskedEngine
from detector.engines.program import program_of
from detector.images import ImageSpec, Pixels
from detector.network.decouple import GatedNet, decouple
from detector.network.macs import cost_of
from detector.network.networks import build_network
from detector.network.normalise import Normalise
from detector.network.resnet import SmallResNet
from detector.paths.encoder import Evidence, encode
from detector.paths.features import features_named, rows_of
from detector.scoring.classifier import default_estimator
from detector.scoring.compiled_score import LinearScore, linear_score
from detector.scoring.detector import detections_of
from detector.scoring.thresholds import Calibration, Scores
from pathguard.tables import show

KEEP = 0.6
CPU = torch.device("cpu")
VGG16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
# Network -> side of its images, classes; bars of eager, best engine, batch 32.
SIZES = {"resnet20": (32, 10), "resnet56": (32, 10), "resnet18": (224, 1000), "vgg16": (224, 1000)}
# Classes -> what the score reads. How much better the best other class explains a path is asked of every class: with a
# thousand of them that costs more than it is worth.
FEATURES = {10: "all", 1000: "bits+gates+margins"}
DEPTHS = {"resnet20": 20, "resnet56": 56}
EAGER_BARS = {"resnet20": 0.9, "resnet56": 0.8, "resnet18": 0.7, "vgg16": 0.7}
BEST_BARS = {"resnet20": 1.15, "resnet56": 1.0, "resnet18": 0.9, "vgg16": 0.9}
BATCH, BATCH_BAR, LIMIT_BAR, VERDICT_BAR, MEMORY_BAR, LABELS_BAR = 32, 1.1, 1.5, 3.0, 1.1, 99.99


@dataclass(frozen=True)
class Subject:
    """A network, plain and decoupled, with a score on its paths.

    Attributes:
        spec: its images.
        backbone: the plain network.
        network: the same with gates.
        score: what turns a path into a score where an engine can.
        score_of: the same in NumPy.
        calibration: made-up scores of clean images.
    """

    spec: ImageSpec
    backbone: nn.Module
    network: GatedNet
    score: LinearScore
    score_of: Callable[[Evidence], Scores]
    calibration: Calibration


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SIZES)}; may be given again.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of one call.", min=1)] = 1,
    quick: Annotated[bool, typer.Option(help="Under a minute: ResNet-20 alone, without torch.compile.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
    bundle: Annotated[list[Path] | None, typer.Option(help="Trained bundles.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where their data lies.")] = None,
    picture: Annotated[Path | None, typer.Option(help="File for the picture of the bundles.")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    names = ["resnet20"] if quick else only or list(SIZES)
    rows = [row for name in SIZES for row in _network_rows(name, _measure(name, quick) if name in names else None)]
    rows += _bundle_rows(bundle or [], data_dir, picture, quick)
    print_rows(f"keep ratio {KEEP}, {threads} thread(s), medians of interleaved repetitions", rows)
    if json is not None:
        write_rows(json, rows)


def build(name: str) -> tuple[nn.Module, ImageSpec]:
    """A network of `SIZES` with fresh weights, in evaluation mode, and its images."""
    side, classes = SIZES[name]
    backbone = vgg16(3, classes) if name == "vgg16" else build_network(name, 3, classes)
    return backbone.eval(), ImageSpec(side, side, 3)


def vgg16(channels: int, classes: int) -> nn.Module:
    """VGG-16 with batch normalisation, for 224 x 224 (Simonyan and Zisserman 2015, configuration D)."""
    layers: list[nn.Module] = [Normalise(channels)]
    for group in VGG16:
        for filters in group:
            layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU()]
            channels = filters
        layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(channels * 49, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *head, nn.Linear(4096, classes))


def settle(network: nn.Module, images: torch.Tensor) -> None:
    """Set the statistics of every batch normalisation to those of `images`."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        network(images)
    for norm in norms:
        norm.eval()


def _subject(name: str) -> Subject:
    torch.manual_seed(0)
    backbone, spec = build(name)
    images = to_tensor(smooth_images(spec, 128 if spec.height < 100 else 12, seed=1), CPU)
    settle(backbone, images)
    network = decouple(backbone, KEEP)
    settle(network, images)
    network.eval()
    rows = rows_of(encode(network, images))
    features = features_named(FEATURES[SIZES[name][1]], SIZES[name][1], network.layers).fit(rows)
    classifier = default_estimator().fit(features.transform(rows), np.arange(len(rows)) % 2)
    score = linear_score(classifier, features)
    assert score is not None  # what `default_estimator` gives
    calibration = Calibration(np.arange(3000.0))
    return Subject(spec, backbone, network, score, KernelScore(score), calibration)


@dataclass(frozen=True)
class Measured:
    """What was measured of one network; seconds, shares in [0, 1].

    Attributes:
        one: side -> seconds for one image.
        many: the same for `BATCH` images.
        macs: share of the plain network's multiply-accumulates that are left, gates and score included.
        opened: share of open filters.
        verdict: the score's share of label and verdict.
        alike: share of labels that are the masked network's.
        memory: peak of our process over the plain one's; None in a quick run.
    """

    one: Mapping[str, float]
    many: Mapping[str, float]
    macs: float
    opened: float
    verdict: float
    alike: float
    memory: float | None


def _network_rows(name: str, m: Measured | None) -> Iterator[Row]:
    best = m.one["ours"] / _best(m.one) if m else None
    held = [
        ("batch 1: label + verdict / plain, both in torch eager",
         m.one["ours, sliced"] / m.one["torch eager"] if m else None, EAGER_BARS[name]),
        ("batch 1: label + verdict / plain, best engine of each", best, BEST_BARS[name]),
        (f"batch {BATCH}: the same", m.many["ours"] / _best(m.many) if m else None, BATCH_BAR),
        ("batch 1: time / (plain time x share of MACs left)", best / m.macs if m and best else None, LIMIT_BAR),
        ("batch 1: verdict alone, % of the total",
         100 * m.verdict if m else None, VERDICT_BAR),
        ("peak memory of a process that loads and answers / the plain one's", m.memory if m else None, MEMORY_BAR),
    ]  # fmt: skip
    for figure, value, bar in held:
        yield Row(figure=f"{name}, {figure}", value=value, bar=bar)
    if m is None:
        return
    yield Row(
        figure=f"{name}, labels equal to the masked network's, % of made-up images", value=100 * m.alike,
        bar=LABELS_BAR, at_most=False,
    )  # fmt: skip
    yield Row(figure=f"{name}, filters open, %", value=100 * m.opened)
    yield Row(figure=f"{name}, MACs left, % of the plain network's", value=100 * m.macs)
    for batch, times in ((1, m.one), (BATCH, m.many)):
        for side, seconds in times.items():
            yield Row(figure=f"{name}, batch {batch}: {side}, ms", value=1000 * seconds)


def _best(times: Mapping[str, float]) -> float:
    """Of the plain network."""
    return min(times[side] for side in ("torch eager", "torch.compile", "ONNX Runtime") if side in times)


def _measure(name: str, quick: bool) -> Measured:
    subject = _subject(name)
    spec, network = subject.spec, subject.network
    pool = smooth_images(spec, 64 if spec.height < 100 else 8, seed=7)
    chosen = choose_engine(network, spec, subject.score, CPU)
    sliced = choose_engine(network, spec, subject.score, CPU, "sliced")
    masked = MaskedEngine(network, CPU)
    evidence = masked.answer(pool).evidence
    cost = cost_of(network, torch.zeros(1, 3, spec.height, spec.width))
    macs = float((cost.of(evidence.path).mean() + subject.score.macs) / cost.dense)
    small = spec.height < 100
    repetitions = (100 if quick else 400 if small else 20) // (3 if name == "resnet56" else 1)

    # Ours and the plain ones first and among themselves; what is only told beside them must not empty their caches.
    engines = {"ours": chosen.engines[1], "ours, sliced": sliced.engines[1]}
    sides = {side: partial(_verdict, subject, made) for side, made in engines.items()}
    plain = _plain_sides(subject.backbone, pool[:1], compiled=not quick)
    calls = {side: _each_image(call, pool) for side, call in (sides | plain).items()}
    one = dict(zip(calls, interleaved(list(calls.values()), repetitions), strict=True))
    beside = {f"ours, {made.name}": _each_image(partial(_verdict, subject, made), pool) for made in _others(subject)}
    narrow = _narrow(name, macs)
    static = None if narrow is None else onnx_call(narrow, to_tensor(pool[:1], CPU))
    if static is not None:
        beside["static, as many MACs, ONNX Runtime"] = static
    one |= dict(zip(beside, interleaved(list(beside.values()), repetitions // 2 + 1), strict=True))

    batch = smooth_images(spec, BATCH, seed=8)
    many_calls: dict[str, Callable[[], object]] = {
        "ours": lambda: detections_of(chosen.answer(batch), subject.score_of, subject.calibration)
    }
    many_calls |= {side: partial(call, batch) for side, call in _plain_sides(subject.backbone, batch, False).items()}
    many = dict(zip(many_calls, interleaved(list(many_calls.values()), max(1, repetitions // 20)), strict=True))

    looked_at = smooth_images(spec, 1000 if small and not quick else len(pool), seed=9)
    found = agreement_of(chosen.answer(looked_at).evidence, masked.answer(looked_at).evidence)
    assert found.exact, found
    memory = None if quick else _peak("ours", name) / _peak("plain", name)
    opened = float(evidence.path.bits.mean())
    return Measured(one, many, macs, opened, _verdict_seconds(subject, evidence) / one["ours"], found.labels, memory)


def _others(subject: Subject) -> Iterator[Engine]:
    for name in ("kernel", "onnx", "masked"):
        chosen = choose_engine(subject.network, subject.spec, subject.score, CPU, name)
        if name not in chosen.refused:
            yield chosen.engines[1]


def _verdict(subject: Subject, engine: Engine | Choice, pixels: Pixels) -> object:
    return detections_of(engine.answer(pixels), subject.score_of, subject.calibration)


def _plain_sides(backbone: nn.Module, pixels: Pixels, compiled: bool) -> dict[str, Callable[[Pixels], object]]:
    """The plain network in each engine; what is given to a call is left aside, all take the same ready tensor."""
    images = to_tensor(pixels, CPU)
    sides: dict[str, Callable[[Pixels], object]] = {"torch eager": lambda _: _forward(backbone, images)}
    if compiled:
        faster = torch.compile(copy.deepcopy(backbone))
        sides["torch.compile"] = lambda _: _forward(faster, images)
    session = onnx_call(backbone, images)
    if session is not None:
        sides["ONNX Runtime"] = lambda _: session()
    return sides


def _forward(network: Callable[[torch.Tensor], object], images: torch.Tensor) -> object:
    with torch.inference_mode():
        return network(images)


def _each_image(call: Callable[[Pixels], object], pool: Pixels) -> Callable[[], object]:
    turns = itertools.cycle(range(len(pool)))

    def run() -> object:
        turn = next(turns)
        return call(pool[turn : turn + 1])

    return run


def _verdict_seconds(subject: Subject, evidence: Evidence) -> float:
    """Of the score alone, for one image."""
    return interleaved([lambda: subject.score_of(evidence)], 50)[0] / len(evidence)


def _narrow(name: str, share: float) -> nn.Module | None:
    """A plain ResNet with so many filters that this share of the multiply-accumulates is left; None of other networks.

    In its speed it is a statically pruned network: which filters are best cut does not change the time.
    """
    if name not in DEPTHS:
        return None
    return SmallResNet(DEPTHS[name], 3, 10, width=max(1, round(16 * share**0.5))).eval()


def _peak(side: str, name: str) -> float:
    """Megabytes that a process of its own holds at most while it loads a network from a file and answers images."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights"
        backbone, _ = build(name)
        network = backbone if side == "plain" else decouple(backbone, KEEP).eval()
        torch.save(network.state_dict(), file)
        del backbone, network
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_answer_alone, (side, name, file))


def _answer_alone(side: str, name: str, file: Path) -> float:
    torch.set_num_threads(1)
    with torch.device("meta"):
        backbone, spec = build(name)
        network = backbone if side == "plain" else decouple(backbone, KEEP).eval()
    network.load_state_dict(torch.load(file, weights_only=True), assign=True)
    pixels = smooth_images(spec, 4)
    if isinstance(network, GatedNet):
        engine = KernelEngine(program_of(network, spec))
        del network, backbone
        for _ in range(5):
            engine.answer(pixels[:1])
    else:
        for _ in range(5):
            _forward(network, to_tensor(pixels[:1], CPU))
    return _peak_megabytes()


def _peak_megabytes() -> float:
    # Not ru_maxrss: that of a new process begins with its parent's.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _bundle_rows(bundles: Sequence[Path], data_dir: Path | None, picture: Path | None, quick: bool) -> list[Row]:
    """Trained bundles on their own test images."""
    points, rows = [], []
    alike: list[float] = []
    for folder in bundles:
        bundle = Bundle(folder)
        test = load_splits(bundle.manifest.network.data, data_dir).held_out.first(500 if quick else None)
        network, spec = bundle.network(), bundle.manifest.network.spec
        engine = choose_engine(network, spec, None, CPU)
        masked = MaskedEngine(network, CPU)
        found, expected = (
            Evidence.stacked(made.answer(test.pixels(slice(i, i + 500))).evidence for i in range(0, len(test), 500))
            for made in (engine, masked)
        )
        assert found is not None, folder
        assert expected is not None, folder
        held = agreement_of(found, expected)
        cost = cost_of(network, torch.zeros(1, spec.channels, spec.height, spec.width))
        pool = test.pixels(slice(0, 64))
        ours, plain = interleaved(
            [_each_image(engine.answer, pool), _each_image(_plain_best(bundle.backbone(), pool), pool)],
            50 if quick else 300,
        )
        alike.append(100 * held.labels)
        points.append(
            {
                "bundle": folder.name,
                "keep": bundle.manifest.gates.keep if bundle.manifest.gates else None,
                "accuracy, %": 100 * float((found.class_logits.argmax(axis=1) == test.labels).mean()),
                "MACs left, %": 100 * float(cost.of(found.path).mean() / cost.dense),
                "ms": 1000 * ours,
                "plain, ms": 1000 * plain,
                "engine": engine.name,
                "bits that differ, unsure": held.unsure_bits,
                "bits that differ, else": held.wrong_bits,
                "largest logit error": held.logit_error,
                "labels equal, %": 100 * held.labels,
            }
        )
        rows.append(
            Row(figure=f"{folder.name}: milliseconds / plain, batch 1, without the verdict", value=ours / plain)
        )
    if points:
        show("accuracy against multiply-accumulates and milliseconds, test images", points)
        if picture is not None:
            _draw(points, picture)
    return [
        Row(
            figure="labels equal to the masked network's, trained bundles, % of the test images",
            value=min(alike) if alike else None, bar=LABELS_BAR, at_most=False,
        ),
        *rows,
    ]  # fmt: skip


def _plain_best(backbone: nn.Module, pool: Pixels) -> Callable[[Pixels], object]:
    sides = _plain_sides(backbone, pool[:1], compiled=False)
    return sides.get("ONNX Runtime", sides["torch eager"])


def _draw(points: Sequence[Mapping[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    for axes, across in zip(figure.subplots(1, 2, sharey=True), ("MACs left, %", "ms"), strict=True):
        axes.scatter([point[across] for point in points], [point["accuracy, %"] for point in points])
        for point in points:
            axes.annotate(f"{point['keep']:g}", (point[across], point["accuracy, %"]))
        axes.set_xlabel(across)
        axes.set_ylabel("accuracy, %")
    figure.savefig(file)


if __name__ == "__main__":
    typer.run(main)
