"""The fastest exact engine for a network on this machine, found by measuring: for one image, and for more.

Every engine that can run the network is timed on the same made-up images, in turns, when a bundle is loaded. Before it
may be chosen, its answers are held against those of the masked network.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from detector.engines.compaction import CheckedEngine, compacted
from detector.engines.cuda import CudaEngine
from detector.engines.engine import Answers, Engine
from detector.engines.kernel import KernelEngine
from detector.engines.masked import MaskedEngine
from detector.engines.onnx import OnnxEngine
from detector.engines.program import Program, program_of
from detector.engines.sliced import SlicedEngine
from detector.engines.together import choose_together, report
from detector.errors import EngineError, RequestError
from detector.images import ImageSpec, Pixels
from detector.network.decouple import GatedNet
from detector.paths.encoder import Evidence, Floats
from detector.paths.path_encoding import Bits
from detector.scoring.compiled_score import FoldedScore
from detector.scoring.thresholds import Scores

_log = logging.getLogger(__name__)

FASTEST = "fastest"
ENGINES = ("kernel", "onnx", "sliced", "cuda", "masked")
_OF_PROGRAMS = ("kernel", "onnx", "sliced")
BATCHES = (1, 8, 32)
# Another engine is no gain unless it is faster by more than a clock on a busy machine can tell.
_GAIN = 0.95
_SECONDS = 0.3
_REPETITIONS = 9
# On a processor an engine this many times slower than another one for one image does not catch up with it in a batch.
_HOPELESS = 4.0
# What exact means: path bits may differ only where a gate logit is this close to zero, class logits and gate inputs by
# this much.
GATE_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-4
# Of a score; columns of likelihoods are float32, and no rounding is like another.
SCORE_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the answers of an engine compare with those of the masked network.

    Attributes:
        images: how many were compared.
        unsure_bits: path bits that differ where the gate logit lies within `GATE_TOLERANCE` of zero, or behind such
            a bit in the same image.
        wrong_bits: path bits that differ elsewhere.
        logit_error: largest difference of a class logit among images of equal paths; of logits beyond 1, relative to
            the image's largest.
        input_error: likewise, of what a gate read.
        labels: share of equal labels, in [0, 1]; 1 without images.
    """

    images: int
    unsure_bits: int
    wrong_bits: int
    logit_error: float
    input_error: float
    labels: float

    @property
    def exact(self) -> bool:
        """Whether the engine may serve in the place of the masked network."""
        # Each by itself: beside a number, NaN would go unseen.
        return self.wrong_bits == 0 and self.logit_error <= LOGIT_TOLERANCE and self.input_error <= LOGIT_TOLERANCE


def agreement_of(found: Evidence, expected: Evidence) -> Agreement:
    """Hold the evidence of an engine against that of the masked network on the same images."""
    differ = found.path.bits != expected.path.bits
    # Behind an unsure bit that differs, layers read something else: what they say is no longer comparable.
    unsure = differ & (np.abs(expected.gate_logits) <= GATE_TOLERANCE)
    excused = np.logical_or.accumulate(unsure, axis=1)
    same = ~differ.any(axis=1)
    equal = found.class_logits.argmax(axis=1) == expected.class_logits.argmax(axis=1)
    return Agreement(
        images=len(found),
        unsure_bits=int((differ & excused).sum()),
        wrong_bits=int((differ & ~excused).sum()),
        logit_error=_error(found.class_logits[same], expected.class_logits[same]),
        input_error=_error(found.inputs.means[same], expected.inputs.means[same]),
        labels=float(equal.mean()) if len(equal) else 1.0,
    )


def _error(found: Floats, expected: Floats) -> float:
    """The largest difference; of an image whose largest number is beyond 1, relative to that."""
    scale = np.maximum(1.0, np.abs(expected).max(axis=1, keepdims=True, initial=0.0))
    return float((np.abs(found - expected) / scale).max(initial=0.0))


@dataclass(frozen=True, slots=True)
class Choice:
    """The engines that a network is served by.

    Attributes:
        engines: images at least -> the engine for batches from there on; the first is for one image.
        milliseconds: engine -> images -> median time of a batch, as measured.
        refused: engine -> why it is not there.
        remarks: what engines chose among themselves by measuring, a line each.
    """

    engines: Mapping[int, Engine]
    milliseconds: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    @property
    def name(self) -> str:
        """For example `kernel`, or `kernel, from 32 images onnx`."""
        parts: list[str] = []
        before = None
        for least, engine in self.engines.items():
            if engine.name != before:
                parts.append(engine.name if before is None else f"from {least} images {engine.name}")
            before = engine.name
        return ", ".join(parts)

    @property
    def answered_in_full(self) -> int:
        """Images that opened a filter which a compacted bundle is served without, and went to the full network."""
        different = {id(engine): engine for engine in self.engines.values()}
        return sum(engine.broken for engine in different.values() if isinstance(engine, CheckedEngine))

    def uncounted(self) -> "Choice":
        """Itself, with the images of the measurements forgotten."""
        for engine in self.engines.values():
            if isinstance(engine, CheckedEngine):
                engine.broken = 0
        return self

    def report(self) -> list[str]:
        """What was measured and what is not there, a line each, for a log."""
        lines = [
            f"engine {name}: " + ", ".join(f"{images} images in {taken:.3g} ms" for images, taken in times.items())
            for name, times in self.milliseconds.items()
        ]
        return [*lines, *self.remarks, *(f"no engine {name}: {why}" for name, why in self.refused.items())]

    def answer(self, pixels: Pixels) -> Answers:
        """As `Engine.answer`, by the engine for so many images."""
        return self.for_images(len(pixels)).answer(pixels)

    def for_images(self, count: int) -> Engine:
        """The engine for a batch of `count` images."""
        chosen = next(iter(self.engines.values()))
        for least, engine in self.engines.items():
            if count >= least:
                chosen = engine
        return chosen


def choose_engine(
    network: GatedNet,
    spec: ImageSpec,
    score: FoldedScore | None,
    device: torch.device,
    wanted: str = FASTEST,
    never_open: Bits | None = None,
) -> Choice:
    """The engine that is asked for, or the fastest.

    Args:
        network: the decoupled network, in evaluation mode.
        spec: the images that it takes.
        score: what turns a path into a score, for engines that can do so in the same call.
        device: where the masked network runs, and on a GPU the engine `cuda`; the others run on the processor.
        wanted: a name of `ENGINES`, or `fastest`.
        never_open: filters to do without until an image opens one, `(filters,)`; None for all filters. `masked` and
            `cuda` keep them all.

    One that is asked for and is not installed, or cannot run the network, is replaced by the fastest of the others; the
    log and `Choice.refused` say so.

    Raises:
        RequestError: there is no engine of that name.
    """
    if wanted not in (FASTEST, *ENGINES):
        raise RequestError(f"expected an engine of {', '.join((FASTEST, *ENGINES))}, got {wanted!r}")
    masked = MaskedEngine(network, device)
    if wanted == "masked":
        return Choice({1: masked})
    engines: dict[str, Engine] = {"masked": masked}
    refused: dict[str, str] = {}
    remarks: list[str] = []
    images = smooth_images(spec, max(BATCHES))
    make: dict[str, Callable[[], Engine]] = {"cuda": lambda: CudaEngine(masked.network, spec, score)}
    try:
        program = program_of(masked.network, spec)  # what is folded already is not copied, but read by all engines
    except EngineError as error:
        _log.warning("no engine that skips is there: %s", error)
        refused = dict.fromkeys(_OF_PROGRAMS, str(error))
    else:
        make |= {name: partial(_made, name, program, score, never_open, images, remarks) for name in _OF_PROGRAMS}
    expected = masked.answer(images[:4]).evidence
    for name in sorted(make, key=lambda name: name != wanted):
        try:
            made = make[name]()
            answers = made.answer(images[:4])
            found = agreement_of(answers.evidence, expected)
            wrong = 0.0
            if score is not None and answers.scores is not None:
                wrong = score_error(answers.scores, score.of(answers.evidence))
        except EngineError as error:
            refused[name] = str(error)
        else:
            if found.exact and wrong <= SCORE_TOLERANCE:
                if name == wanted:
                    return Choice({1: made}, remarks=remarks).uncounted()
                engines[name] = made
                continue
            refused[name] = (
                f"expected the answers of the masked network, got {found}"
                if not found.exact
                else f"expected the scores of the classifier, got others by {wrong:.2g}"
            )
        if name == wanted:
            _log.warning("engine %s was asked for, another serves: %s", name, refused[name])
    if len(engines) == 1:
        return Choice({1: masked}, refused=refused)
    chosen = _fastest(engines, images, refused, _HOPELESS if device.type == "cpu" else np.inf)
    return replace(chosen, remarks=remarks).uncounted()


def _made(
    name: str,
    program: Program,
    score: FoldedScore | None,
    never_open: Bits | None,
    images: Pixels,
    remarks: list[str],
) -> Engine:
    threads = torch.get_num_threads()

    def kernel(program: Program) -> Engine:
        made = KernelEngine(program, score, threads)
        choose_together(made, images)
        remarks.append(report(made))
        return made

    make: Mapping[str, Callable[[Program], Engine]] = {
        "kernel": kernel,
        "onnx": lambda program: OnnxEngine(program, score, threads),
        "sliced": SlicedEngine,
    }
    made = make[name](program)
    if never_open is None:
        return made
    return CheckedEngine(make[name](compacted(program, never_open)), never_open, made)


def score_error(found: Scores, expected: Scores) -> float:
    """Largest difference of scores from the classifier's, both `(images,)`; of those beyond 1, relative to them."""
    errors = np.abs(found - expected) / np.maximum(1.0, np.abs(expected))
    return float(np.nan_to_num(errors, nan=np.inf).max(initial=0.0))


def _fastest(engines: Mapping[str, Engine], images: Pixels, refused: Mapping[str, str], hopeless: float) -> Choice:
    taken: dict[str, dict[int, float]] = {name: {} for name in ENGINES if name in engines}
    chosen: dict[int, Engine] = {}
    for batch in BATCHES:
        one = min((times[1] for times in taken.values() if 1 in times), default=0.0)
        if one * batch > 1000 * _SECONDS:  # too long to wait for; what is best for one image is taken
            continue
        running = {
            name: engines[name]
            for name, times in taken.items()
            if not times or (times[1] <= hopeless * one and times[1] * batch < 4000 * _SECONDS)
        }
        for name, milliseconds in _timed(running, images[:batch], hopeless).items():
            taken[name][batch] = milliseconds
        best = min(running, key=lambda name: taken[name][batch])
        before = next(reversed(chosen.values()), None)
        if before is None or before.name not in running or taken[best][batch] < _GAIN * taken[before.name][batch]:
            chosen[batch] = engines[best]
    return Choice(chosen, taken, refused)


def _timed(engines: Mapping[str, Engine], images: Pixels, hopeless: float) -> dict[str, float]:
    """Median milliseconds of each, in `_SECONDS`; one that is `hopeless` times slower than another is left at once."""
    medians: dict[str, float] = {}
    for name, engine in engines.items():
        engine.answer(images)
        times: list[float] = []
        while len(times) < _REPETITIONS and (sum(times) < 1000 * _SECONDS or not times):
            began = time.perf_counter()
            engine.answer(images)
            times.append(1000 * (time.perf_counter() - began))
            if min(times) > hopeless * min(medians.values(), default=np.inf):
                break
        medians[name] = float(np.median(times))
    return medians


def smooth_images(spec: ImageSpec, count: int, seed: int = 0) -> Pixels:
    """Made-up images that vary slowly from pixel to pixel, as photos do, `(count, height, width, channels)`."""
    coarse = torch.rand(count, spec.channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (spec.height, spec.width), mode="bilinear", align_corners=False)
    pixels: Pixels = (255 * fine).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return pixels
