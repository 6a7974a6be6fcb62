"""Label and verdict against the label alone: is the network with its detector faster than without?

    python -m benchmarks.speed [--only NETWORK] [--threads N] [--quick] [--json FILE] [--anew]
                               [--bundle DIR] [--curves DIR] [--data-dir DIR] [--picture FILE] [--work DIR]

Each network is decoupled at a keep ratio of 0.6 with fresh weights, its normalisations settled on made-up images, so
that about that share of the filters opens and depends on the image; time does not depend on whether labels are right.
The plain side takes a ready tensor and gives logits, in torch eager, torch.compile and ONNX Runtime; ours takes 8-bit
pixels and gives labels, probabilities, scores, p-values and paths. Repetitions are interleaved, each on another image.
A network whose filters are cut to as many multiply-accumulates, the same for all images, stands beside: what static
pruning would give, at whatever accuracy. As in the server, memory that was freed is kept, by all sides.

`--only layers` tells what each layer of a batch takes in the compiled kernel, and what it would in other ways.

With a trained bundle the labels of the engine are held against the masked network's on all test images, and, with what
`python -m benchmarks.curves` has trained from it, accuracy is told against multiply-accumulates and milliseconds, for
decoupled and for statically pruned networks.

Where there is an NVIDIA GPU all is measured on it too (`--only gpu` for that alone); elsewhere its rows have no value.

What is measured is kept in the work folder, a network at a time, and read again by a later run of the same sources on
the same machine; `--anew` measures all of it again.
"""

import hashlib
import json as jsonlib
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from benchmarks import curve_points, gpu, layers
from benchmarks.curve_picture import draw_curves
from benchmarks.curve_points import Curves, Point
from benchmarks.curves import BUNDLE
from benchmarks.curves import WORK as CURVES
from benchmarks.onnx_sessions import onnx_call
from benchmarks.plain import CPU, EAGER, best_of, each_image, forward, plain_sides
from benchmarks.report import Row, machine, print_rows, write_rows
from benchmarks.timing import interleaved
from detector.batches import best_device, to_tensor
from detector.bundle import MANIFEST, Bundle
from detector.engines.choice import FASTEST, Choice, agreement_of, choose_engine, smooth_images
from detector.engines.cuda import CudaEngine
from detector.engines.engine import Engine
from detector.engines.kernel import GROUP, KernelEngine
from detector.engines.kernel_score import KernelScore
from detector.engines.masked import MaskedEngine
from detector.engines.program import program_of
from detector.files import sha256_of, write_whole
from detector.images import ImageSpec, Pixels
from detector.memory import keep_freed_memory
from detector.network.decouple import GatedNet, decouple
from detector.network.macs import cost_of
from detector.network.networks import build_network
from detector.network.normalise import Normalise
from detector.network.resnet import SmallResNet
from detector.paths.encoder import Evidence, encode
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import features_named
from detector.scoring.classifier import default_estimator
from detector.scoring.compiled_score import FoldedScore, folded_score
from detector.scoring.detector import detections_of
from detector.scoring.thresholds import Calibration, Scores
from pathguard.commands.options import DataDir
from pathguard.tables import show

KEEP = 0.6
VGG16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
# Network -> side of its images, classes; bars of eager, best engine, batch 32.
SIZES = {"resnet20": (32, 10), "resnet56": (32, 10), "resnet18": (224, 1000), "vgg16": (224, 1000)}
PARTS = (*SIZES, "layers", "gpu", "curves")
# Classes -> what the score reads: of ten, as in the bundle that `pathguard serve` starts by default. How much better
# the best other class explains a path is asked of every class: with a thousand that costs more than it is worth.
FEATURES = {10: "bits+gates+margins+doubts+path-likelihoods+gate-likelihoods", 1000: "bits+gates+margins"}
DEPTHS = {"resnet20": 20, "resnet56": 56}
EAGER_BARS = {"resnet20": 0.9, "resnet56": 0.8, "resnet18": 0.7, "vgg16": 0.7}
BEST_BARS = {"resnet20": 1.15, "resnet56": 1.0, "resnet18": 0.9, "vgg16": 0.9}
# CIFAR-10: method, network, accuracy of the plain network and with the method, share of operations left out; percent.
# Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", ICLR 2019; Elkerdawy et al., "Fire Together
# Wire Together", CVPR 2022. As their papers state them, not run here.
PUBLISHED = (
    ("FTWT", "ResNet-56", 93.66, 92.63, 66.0),
    ("FTWT", "VGG16-bn", 93.82, 93.73, 56.0),
    ("FBS", "M-CifarNet", 91.37, 90.54, 66.7),
)
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
    score: FoldedScore
    score_of: Callable[[Evidence], Scores]
    calibration: Calibration


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; may be given again.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of one call.", min=1)] = 1,
    quick: Annotated[bool, typer.Option(help="Under a minute: ResNet-20 alone, without torch.compile.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the rows {figure, value, bar, met}.")] = None,
    anew: Annotated[bool, typer.Option(help="Measure what an earlier run has measured, too.")] = False,
    bundle: Annotated[Path, typer.Option(help="Trained bundle.")] = BUNDLE,
    curves: Annotated[Path, typer.Option(help="What benchmarks.curves trained from it.")] = CURVES,
    data_dir: DataDir = None,
    picture: Annotated[Path | None, typer.Option(help="File for the picture of the curves.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of what was measured.")] = Path("runs/speed"),
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    if unknown := set(only or ()) - {*PARTS}:
        raise typer.BadParameter(f"expected {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    wanted = ["resnet20"] if quick else only or PARTS
    kept = Kept(work, threads, anew, quick)
    rows: list[Row] = []
    for name in SIZES:
        found = kept.measured(name, partial(_measured_values, name, quick)) if name in wanted else None
        rows += _network_rows(name, None if found is None else Measured(**found))
    for name in SIZES if "layers" in wanted else ():
        found = kept.measured(f"{name}-layers", partial(_measured_layers, name))
        show(f"{name}, {GROUP} images: what each takes of a step", found["steps"])
        rows += layers.rows_of(name, found["steps"], GROUP)
    has_gpu = "gpu" in wanted and torch.cuda.is_available()
    on_gpu = torch.cuda.get_device_name() if has_gpu else "no NVIDIA GPU"
    for name in SIZES:
        found = kept.measured(f"{name}-gpu", partial(_measured_on_gpu, name), on_gpu) if has_gpu else None
        rows += gpu.rows(name, found, (1, BATCH))
    points = None
    if "curves" in wanted and (bundle / MANIFEST).exists():
        start = Bundle(bundle)
        made = sorted(f"{file} {sha256_of(file)}" for file in curves.glob("*/*") if file.is_file())
        read = kept.measured(
            "curves", lambda: asdict(curve_points.measure(start, curves, data_dir)), start.network_digest, *made
        )
        points = Curves(**{**read, "points": tuple(Point(**point) for point in read["points"])})
    rows += _curve_rows(points)
    if points is not None:
        show(
            "accuracy against work, batch 1, without the verdict; accuracy on all test images",
            curve_points.table_of(points),
        )
        if picture is not None:
            on = f"{bundle.name} on {machine().split(',')[0]}; beside each point, the share of filters kept"
            draw_curves(picture, points, on)
        show(
            "operations left out, as published by their authors, and ours",
            _published(points, start.manifest.network.name),
        )
    print_rows(f"keep ratio {KEEP}, {threads} thread(s), {on_gpu}, medians of interleaved repetitions", rows)
    if json is not None:
        write_rows(json, rows)


class Kept:
    """What was measured, by name, in a folder: of the same sources, machine and threads alone."""

    def __init__(self, folder: Path, threads: int, anew: bool, quick: bool) -> None:
        """Quick measurements are neither kept nor read."""
        self._folder, self._anew, self._quick = folder, anew, quick
        root = Path(__file__).resolve().parent.parent
        sources = (file for part in ("detector", "benchmarks") for file in sorted((root / part).rglob("*")))
        digest = hashlib.sha256(f"{machine()} {threads}".encode())
        for file in sources:
            if file.suffix in (".py", ".c", ".h", ".so"):
                digest.update(file.read_bytes())
        self._identity = digest.hexdigest()

    def measured(self, name: str, measure: Callable[[], dict[str, Any]], *also: str) -> dict[str, Any]:
        """What is kept under `name`, or `measure` gives and is kept from then on.

        Args:
            name: of the measurement.
            measure: gives JSON values.
            also: what it was measured of, beside the sources.
        """
        file, identity = self._folder / f"{name}.json", [self._identity, *also]
        if file.exists() and not (self._anew or self._quick):
            content = jsonlib.loads(file.read_text())
            if content["identity"] == identity:
                print(f"{name}: read again from {file}", file=sys.stderr, flush=True)
                found: dict[str, Any] = content["measured"]
                return found
        print(f"{name}: measuring", file=sys.stderr, flush=True)
        made = measure()
        if not self._quick:
            write_whole(file, jsonlib.dumps({"identity": identity, "measured": made}).encode())
        return made


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
    evidence = encode(network, images)
    rows = rows_of(evidence)
    features = features_named(FEATURES[SIZES[name][1]], EvidenceShape.of(evidence)).fit(rows)
    # As many weighted sums as the detector that ships has, 26: of attacks and of benign kinds.
    kinds = min(27, len(rows))
    classifier = default_estimator().fit(features.transform(rows), np.arange(len(rows)) % kinds - 16 * kinds // 27)
    score = folded_score(classifier, features)
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
        memory: peak of a process with our kernel over the plain one's; None in a quick run.
        memory_served: the same of one that chooses its engine by measuring them all.
    """

    one: Mapping[str, float]
    many: Mapping[str, float]
    macs: float
    opened: float
    verdict: float
    alike: float
    memory: float | None
    memory_served: float | None


def _network_rows(name: str, m: Measured | None) -> Iterator[Row]:
    best = m.one["ours"] / best_of(m.one) if m else None
    held = [
        ("batch 1: label + verdict / plain, both in torch eager",
         m.one["ours, sliced"] / m.one[EAGER] if m else None, EAGER_BARS[name]),
        ("batch 1: label + verdict / plain, best engine of each", best, BEST_BARS[name]),
        (f"batch {BATCH}: the same", m.many["ours"] / best_of(m.many) if m else None, BATCH_BAR),
        ("batch 1: time / (plain time x share of MACs left)", best / m.macs if m and best else None, LIMIT_BAR),
        ("batch 1: verdict alone, % of the total",
         100 * m.verdict if m else None, VERDICT_BAR),
        ("peak memory of a process that loads and answers / the plain one's", m.memory if m else None, MEMORY_BAR),
    ]  # fmt: skip
    for figure, value, bar in held:
        yield Row(figure=f"{name}, {figure}", value=value, bar=bar)
    if m is None:
        return
    yield Row(figure=f"{name}, the same where the engine is chosen by measuring", value=m.memory_served)
    yield Row(
        figure=f"{name}, labels equal to the masked network's, % of made-up images", value=100 * m.alike,
        bar=LABELS_BAR, at_most=False,
    )  # fmt: skip
    yield Row(figure=f"{name}, filters open, %", value=100 * m.opened)
    yield Row(figure=f"{name}, MACs left, % of the plain network's", value=100 * m.macs)
    for batch, times in ((1, m.one), (BATCH, m.many)):
        for side, seconds in times.items():
            yield Row(figure=f"{name}, batch {batch}: {side}, ms", value=1000 * seconds)


def _curve_rows(curves: Curves | None) -> Iterator[Row]:
    yield Row(
        figure="labels equal to the masked network's, trained bundles, % of all test images",
        value=curves.labels if curves else None, bar=LABELS_BAR, at_most=False,
    )  # fmt: skip
    if curves is None:
        return
    yield Row(
        figure="path bits of trained bundles that differ, gate logit within 1e-4 of zero", value=curves.unsure_bits
    )
    yield Row(figure="path bits of trained bundles that differ elsewhere", value=curves.wrong_bits, bar=0)
    for point in curves.of(curve_points.OURS):
        yield Row(
            figure=f"keep {point.keep:g}: ms / those of a pruned network as accurate",
            value=curves.ours_over_static(point.keep),
        )


def _published(curves: Curves, network: str) -> list[dict[str, object]]:
    """Operations that are left out, as the papers say (see docs/speed.md), and those of our networks."""
    columns = ("method", "network", "plain, %", "accuracy, %", "left out, %")
    [plain] = curves.of(curve_points.PLAIN)
    ours = [
        (f"ours, keep {point.keep:g}", network, plain.accuracy, point.accuracy, 100 - point.macs)
        for point in curves.of(curve_points.OURS)
    ]
    return [dict(zip(columns, row, strict=True)) for row in (*PUBLISHED, *ours)]


def _measured_values(name: str, quick: bool) -> dict[str, Any]:
    return asdict(_measure(name, quick))


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
    plain = plain_sides(subject.backbone, pool[:1], compiled=not quick)
    calls = {side: each_image(call, pool) for side, call in (sides | plain).items()}
    one = dict(zip(calls, interleaved(list(calls.values()), repetitions), strict=True))
    beside = {f"ours, {made.name}": each_image(partial(_verdict, subject, made), pool) for made in _others(subject)}
    narrow = _narrow(name, macs)
    static = None if narrow is None else onnx_call(narrow, to_tensor(pool[:1], CPU))
    if static is not None:
        beside["static, as many MACs, ONNX Runtime"] = static
    one |= dict(zip(beside, interleaved(list(beside.values()), repetitions // 2 + 1), strict=True))
    verdict = _verdict_seconds(subject, evidence) / one["ours"]

    batch = smooth_images(spec, BATCH, seed=8)
    many_calls: dict[str, Callable[[], object]] = {
        "ours": lambda: detections_of(chosen.answer(batch), subject.score_of, subject.calibration)
    }
    many_calls |= {side: partial(call, batch) for side, call in plain_sides(subject.backbone, batch, False).items()}
    rounds, warm_up = (max(3, repetitions // 20), 3) if small else (2, 1)  # seconds each
    many = dict(zip(many_calls, interleaved(list(many_calls.values()), rounds, warm_up), strict=True))

    looked_at = smooth_images(spec, 1000 if small and not quick else len(pool), seed=9)
    found = agreement_of(chosen.answer(looked_at).evidence, masked.answer(looked_at).evidence)
    assert found.exact, found
    memory = served = None
    if not quick:
        del subject, network, chosen, sliced, masked, engines, sides, plain, calls, beside, many_calls, narrow, static
        at_most = _peak("plain", name)
        memory, served = _peak("ours", name) / at_most, _peak("served", name) / at_most
    return Measured(one, many, macs, float(evidence.path.bits.mean()), verdict, found.labels, memory, served)


def _measured_layers(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    backbone, spec = build(name)
    network = decouple(backbone, KEEP)
    settle(network, to_tensor(smooth_images(spec, GROUP, seed=1), CPU))
    program = program_of(network.eval(), spec)
    return {"steps": layers.measure(program, smooth_images(spec, GROUP, seed=8), 20 if spec.height < 100 else 2)}


def _measured_on_gpu(name: str) -> dict[str, dict[str, float]]:
    """Images, as text -> side -> seconds."""
    subject, device = _subject(name), best_device()
    asked = {gpu.SERVED: FASTEST, gpu.FUSED: CudaEngine.name, gpu.MASKED: MaskedEngine.name}
    chosen = {
        side: choose_engine(subject.network, subject.spec, subject.score, device, engine)
        for side, engine in asked.items()
    }
    ours = {side: partial(_verdict, subject, made) for side, made in chosen.items() if asked[side] not in made.refused}
    return {
        str(batch): gpu.measure(subject.backbone, ours, smooth_images(subject.spec, batch, seed=8), device)
        for batch in (1, BATCH)
    }


def _others(subject: Subject) -> Iterator[Engine]:
    for name in ("kernel", "onnx", "masked"):
        chosen = choose_engine(subject.network, subject.spec, subject.score, CPU, name)
        if name not in chosen.refused:
            yield chosen.engines[1]


def _verdict(subject: Subject, engine: Engine | Choice, pixels: Pixels) -> object:
    return detections_of(engine.answer(pixels), subject.score_of, subject.calibration)


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
        chosen = side == "served"
        engine: Engine | Choice = (
            choose_engine(network, spec, None, CPU) if chosen else KernelEngine(program_of(network, spec))
        )
        del network, backbone
        for _ in range(5):
            engine.answer(pixels[:1])
    else:
        for _ in range(5):
            forward(network, to_tensor(pixels[:1], CPU))
    return _peak_megabytes()


def _peak_megabytes() -> float:
    # Not ru_maxrss: that of a new process begins with its parent's.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    typer.run(main)
