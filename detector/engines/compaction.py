"""A program without the filters that never open, and an engine that answers exactly when one opens all the same.

A convolution loses the filters that were closed on every image that was looked at, with everything that reads them:
columns of the convolutions, gates and linear maps behind. Gates stay whole, and with them all bits of the path: a
filter that opens against all habit is evidence. An image that opens one is answered by the full network instead.
Filters whose sum with a shortcut is what others read stay, since the shortcut still needs their place.
"""

import threading
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from detector.engines.engine import Answers, Engine
from detector.engines.program import (
    CONVOLVE,
    GATE,
    LINEAR,
    MAX_POOL,
    MEAN,
    MEAN_POOL,
    RELU,
    SUBSAMPLE,
    FeatureMap,
    Program,
    Step,
)
from detector.images import Pixels
from detector.paths.encoder import Evidence
from detector.paths.gate_inputs import GateInputs
from detector.paths.path_encoding import Bits, PathEncoding

Kept = npt.NDArray[np.intp]
# What treats each channel alone, so that a channel that is always zero can be left out on both sides.
_BY_CHANNEL = (MAX_POOL, MEAN_POOL, MEAN, RELU, SUBSAMPLE)
# What reads channels side by side, and can leave some unread.
_READS = (CONVOLVE, GATE, LINEAR)


def compacted(program: Program, never_open: Bits) -> Program:
    """`program` without filters that never open.

    Args:
        program: of the whole network.
        never_open: of all filters side by side, `(filters,)`.
    """
    kept: dict[int, Kept] = {}  # map -> the channels that are left
    for step in program.steps:
        if step.kind == CONVOLVE and step.numbers["gate"] >= 0 and step.other < 0:
            first = step.numbers["gate"]
            left = np.flatnonzero(~never_open[first : first + program.maps[step.out].channels])
            # An empty map would be a special case everywhere; one closed filter costs nothing.
            _propose(program, step.out, left if len(left) else np.array([0]), kept)
    maps = tuple(
        FeatureMap(len(kept[index]), shape.height, shape.width) if index in kept else shape
        for index, shape in enumerate(program.maps)
    )
    return replace(program, maps=maps, steps=tuple(_cut(step, program, kept) for step in program.steps))


def _propose(program: Program, written: int, left: Kept, kept: dict[int, Kept]) -> None:
    """Cut the map `written` and those that follow it channel by channel, unless something needs all channels."""
    cut, waiting = [written], [written]
    while waiting:
        current = waiting.pop()
        for step in program.steps:
            if step.other == current or (step.input == current and step.kind not in (*_BY_CHANNEL, *_READS)):
                return
            if step.input == current and step.kind in _BY_CHANNEL:
                cut.append(step.out)
                waiting.append(step.out)
    if program.result not in cut:
        kept |= dict.fromkeys(cut, left)


def _cut(step: Step, program: Program, kept: dict[int, Kept]) -> Step:
    arrays = dict(step.arrays)
    if step.kind == CONVOLVE:
        if step.out in kept:
            left = kept[step.out]
            arrays |= {name: np.ascontiguousarray(arrays[name][left]) for name in ("weights", "biases")}
            arrays["kept"] = left.astype(np.int32)
        if step.input in kept:
            arrays["weights"] = np.ascontiguousarray(arrays["weights"][:, kept[step.input]])
    elif step.kind == GATE and step.input in kept:
        arrays["squeeze"] = np.ascontiguousarray(arrays["squeeze"][kept[step.input]])
        arrays["kept"] = kept[step.input].astype(np.int32)
    elif step.kind == LINEAR and step.input in kept:
        shape = program.maps[step.input]
        weights = arrays["weights"].reshape(-1, shape.channels, shape.pixels)[:, kept[step.input]]
        arrays["weights"] = np.ascontiguousarray(weights.reshape(len(weights), -1))
    return replace(step, arrays=arrays)


def floats_of(program: Program) -> int:
    """Numbers in all weights of `program`."""
    return sum(array.size for step in program.steps for name, array in step.arrays.items() if name != "kept")


class CheckedEngine:
    """A compacted network that looks at each path, and hands images that open a cut filter to the full one."""

    def __init__(self, engine: Engine, never_open: Bits, full: Engine) -> None:
        """Wrap an engine of a compacted program.

        Args:
            engine: answers first.
            never_open: the filters that were cut, `(filters,)`.
            full: an engine of the whole network.
        """
        self.name = f"{engine.name}, compacted"
        self.broken = 0
        self._engine = engine
        self._never_open = never_open
        self._full = full
        self._lock = threading.Lock()

    def answer(self, pixels: Pixels) -> Answers:
        """As `Engine.answer`; `broken` counts the images that the full network answered."""
        answers = self._engine.answer(pixels)
        # All bits up to the first cut filter that opens are right, so that none can open unseen.
        broken = np.flatnonzero((answers.evidence.path.bits & self._never_open).any(axis=1))
        if not len(broken):
            return answers
        with self._lock:
            self.broken += len(broken)
        return _replaced(answers, broken, self._full.answer(np.ascontiguousarray(pixels[broken])))


def _replaced(answers: Answers, places: npt.NDArray[np.intp], right: Answers) -> Answers:
    old, new = answers.evidence, right.evidence
    class_logits, gate_logits = old.class_logits.copy(), old.gate_logits.copy()
    bits, means = old.path.bits.copy(), old.inputs.means.copy()
    class_logits[places], gate_logits[places] = new.class_logits, new.gate_logits
    bits[places], means[places] = new.path.bits, new.inputs.means
    scores = None
    if answers.scores is not None and right.scores is not None:
        scores = answers.scores.copy()
        scores[places] = right.scores
    path, inputs = PathEncoding(bits, old.path.layers), GateInputs(means, old.inputs.reads)
    return Answers(Evidence(class_logits, gate_logits, path, inputs), scores)
