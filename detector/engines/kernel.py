"""The engine that skips: only the filters that an image opens, read from only the channels that it opened before.

One call of a compiled library (kernel.c) answers label, path and score. The library is built when Pathguard is
installed, if there is a C compiler; without one this engine is not there, and another is chosen.
"""

import ctypes
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from detector.engines.engine import Answers
from detector.engines.kernel_score import KernelScore
from detector.engines.library import MapLayout, ProgramLayout, StepLayout, layout_of, library
from detector.engines.program import ALIGNMENT, CONVOLVE, GATE, MAX_POOL, MEAN_POOL, Program, laid_out
from detector.errors import EngineError, ImageError
from detector.images import Pixels
from detector.paths.encoder import Evidence
from detector.paths.evidence_shape import EvidenceShape
from detector.paths.gate_inputs import GateInputs
from detector.paths.path_encoding import PathEncoding
from detector.scoring.compiled_score import FoldedScore

_VECTOR_BYTES = 64
# Images that are taken through a network side by side at most, where some steps are taken together.
GROUP = 8


class KernelEngine:
    """A decoupled network in the compiled kernel."""

    name = "kernel"

    def __init__(self, program: Program, score: FoldedScore | None = None, threads: int = 1) -> None:
        """Find room for the feature maps of `program`.

        Args:
            program: of the decoupled network.
            score: what turns a path into a score in the same call; None for no scores.
            threads: among which the images of a batch are divided; one image takes one.

        Raises:
            EngineError: the library was not built, or the score is of another network.
        """
        self._run = library().pathguard_run
        self._program = program
        self._image_bytes = program.maps[0].pixels * program.maps[0].channels
        self._widest = max(shape.channels for shape in program.maps)
        shape = EvidenceShape(program.classes, program.layers, program.reads)
        if score is not None and score.features.shape != shape:  # the library looks at no bounds
            raise EngineError(f"expected a score of a network with {shape}, got one of {score.features.shape}")
        self._score = None if score is None else KernelScore(score)
        # The compiled code reads them where they lie: kept for as long as the engine.
        self._arrays = [{name: _aligned(array) for name, array in step.arrays.items()} for step in program.steps]
        self._alone = self._batches = self._walk(())
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kernel") if threads > 1 else None
        self._parts = threads

    def _walk(self, together: Collection[int]) -> "_Walk":
        return _Walk(self._program, self._arrays, self._score, frozenset(together))

    @property
    def program(self) -> Program:
        """What it runs."""
        return self._program

    @property
    def together(self) -> tuple[int, ...]:
        """Numbers of the steps that all images of a group take before any of them goes on."""
        return tuple(sorted(self._batches.together))

    def take_together(self, steps: Collection[int]) -> None:
        """Have the images of a batch take these steps of the program side by side; the answers stay the same."""
        self._batches = self._walk(steps) if steps else self._alone

    def step_milliseconds(
        self, pixels: Pixels, ways: Sequence[Collection[int]], repetitions: int = 3
    ) -> npt.NDArray[np.float64]:
        """What each step of the program takes of a batch at least, in one thread, `(ways, steps)`.

        Args:
            pixels: at least one image; of one, no step is taken together.
            ways: for each, the steps that are taken together.
            repetitions: of each way, in turns, after one that is not counted.
        """
        walks = [self._walk(way) for way in ways]
        nanoseconds = np.zeros((1 + repetitions, len(ways), len(self._program.steps)), np.int64)
        for repetition in nanoseconds:
            for walk, row in zip(walks, repetition, strict=True):
                self._answer(walk, pixels, *self._room(len(pixels)), row)
        least: npt.NDArray[np.float64] = nanoseconds[1:].min(axis=0) / 1e6
        return least

    def answer(self, pixels: Pixels) -> Answers:
        """As `Engine.answer`.

        Raises:
            ImageError: the pixels are not of the program's size.
        """
        shape = self._program.maps[0]
        if pixels.shape[1:] != (shape.height, shape.width, shape.channels) or pixels.dtype != np.uint8:
            raise ImageError(
                f"expected uint8 pixels of {shape.height} x {shape.width} x {shape.channels}, got {pixels.dtype} "
                f"{pixels.shape[1:]}"
            )
        pixels = np.ascontiguousarray(pixels)
        count = len(pixels)
        class_logits, gate_logits, means, bits, scores = self._room(count)
        if self._threads is None or count < 2:
            walk = self._alone if count < 2 else self._batches
            self._answer(walk, pixels, class_logits, gate_logits, means, bits, scores)
        else:

            def run(part: slice) -> None:
                own_scores = None if scores is None else scores[part]
                own = class_logits[part], gate_logits[part], means[part], bits[part]
                self._answer(self._batches, pixels[part], *own, own_scores)

            ends = np.linspace(0, count, min(self._parts, count) + 1).astype(int).tolist()
            list(self._threads.map(run, [slice(begin, end) for begin, end in pairwise(ends)]))
        path, inputs = PathEncoding(bits, self._program.layers), GateInputs(means, self._program.reads)
        return Answers(Evidence(class_logits, gate_logits, path, inputs), scores)

    def _room(self, count: int) -> "_Room":
        program = self._program
        class_logits, gate_logits, means = (
            np.empty((count, width), np.float32) for width in (program.classes, program.filters, program.channels_read)
        )
        scores = np.empty(count, np.float64) if self._score is not None else None
        return class_logits, gate_logits, means, np.empty((count, program.filters), np.bool_), scores

    def _answer(
        self,
        walk: "_Walk",
        pixels: Pixels,
        class_logits: npt.NDArray[np.float32],
        gate_logits: npt.NDArray[np.float32],
        means: npt.NDArray[np.float32],
        bits: npt.NDArray[np.bool_],
        scores: npt.NDArray[np.float64] | None,
        nanoseconds: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Write what there is to say about `pixels` into the other arrays; the library lets other threads run."""
        with walk.arena() as arena:
            failed = self._run(
                walk.layout, len(pixels), self._image_bytes, self._widest, pixels.ctypes.data, arena.ctypes.data,
                class_logits.ctypes.data, gate_logits.ctypes.data, means.ctypes.data, bits.ctypes.data,
                None if scores is None else scores.ctypes.data,
                None if nanoseconds is None else nanoseconds.ctypes.data,
            )  # fmt: skip
        if failed:
            raise MemoryError("expected room for the marks of a path, got none")


_Floats = npt.NDArray[np.float32]
_Room = tuple[_Floats, _Floats, _Floats, npt.NDArray[np.bool_], npt.NDArray[np.float64] | None]


class _Walk:
    """The program as the library reads it: which steps the images of a group take together, and where maps lie.

    The images of a group share one place for maps that one of them is done with before the next one writes them. Of the
    other maps each image has its own.
    """

    def __init__(
        self,
        program: Program,
        arrays: Sequence[Mapping[str, npt.NDArray[Any]]],
        score: KernelScore | None,
        together: frozenset[int],
    ) -> None:
        self.together = together
        own = _own_maps(program, together)
        shared = [number for number in range(len(program.maps)) if number not in own]
        offsets, floats = _places(program, shared)
        own_offsets, own_floats = _places(program, own)
        offsets.update(own_offsets)
        self._maps = (MapLayout * len(program.maps))()
        marks = 0
        for number, (layout, shape) in enumerate(zip(self._maps, program.maps, strict=True)):
            layout.data, layout.open, layout.own = offsets[number], marks, number in own
            layout.channels, layout.height, layout.width = shape.channels, shape.height, shape.width
            marks += shape.channels
        self._steps = (StepLayout * len(program.steps))(*map(layout_of, program.steps, arrays))
        for number in together:
            self._steps[number].together = 1
        self._score = score
        group = GROUP if together else 1
        # The last vectors of a convolution may read, and drop, what lies behind the map.
        scratch = max(_scratch(program), 0 if score is None else score.room) + 256
        behind = -(-(floats + scratch) // ALIGNMENT) * ALIGNMENT
        self._layout = ProgramLayout(
            maps=ctypes.addressof(self._maps), steps=ctypes.addressof(self._steps), steps_count=len(program.steps),
            classes=program.classes, filters=program.filters, result=program.result, reads=program.channels_read,
            marks=marks, scratch=floats,
            score=None if score is None else ctypes.addressof(score.layout),
            own=behind, own_size=own_floats, group=group,
        )  # fmt: skip
        self.layout = ctypes.addressof(self._layout)
        self._floats = behind + group * own_floats + (256 if own else 0)
        self._arenas: list[npt.NDArray[np.float32]] = []
        self._lock = threading.Lock()

    @contextmanager
    def arena(self) -> Iterator[npt.NDArray[np.float32]]:
        """Room for the maps of a group, for one call at a time."""
        with self._lock:
            arena = self._arenas.pop() if self._arenas else _aligned(np.zeros(self._floats, np.float32))
        try:
            yield arena
        finally:
            with self._lock:
                self._arenas.append(arena)


def _aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, or a copy, that begins where a vector of the processor does; others are read slower.

    Torch's tensors begin there, NumPy's arrays anywhere. Weights that are not copied are those of the program.
    """
    if array.flags.c_contiguous and array.ctypes.data % _VECTOR_BYTES == 0:
        return array
    room = np.empty(array.nbytes + _VECTOR_BYTES, np.uint8)
    begin = -room.ctypes.data % _VECTOR_BYTES
    copy = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _own_maps(program: Program, together: Collection[int]) -> list[int]:
    """Maps of which each image of a group needs its own: what is still read when another image takes a step."""
    if not together:
        return []
    stretch, number = [], 0  # of steps that an image takes alone; each that is taken together is one by itself
    for index in range(len(program.steps)):
        number += index in together or index - 1 in together
        stretch.append(number)
    written = {step.out: stretch[index] for index, step in enumerate(program.steps) if step.kind != GATE}
    own = {program.result, *(step.out for index, step in enumerate(program.steps) if index in together)}
    for index, step in enumerate(program.steps):
        own |= {read for read in (step.input, step.other) if read >= 0 and written[read] != stretch[index]}
    return sorted(own - {-1})


def _places(program: Program, chosen: Collection[int]) -> tuple[dict[int, int], int]:
    """The offset of each of some maps, in floats, and where they end; maps that are done with are overwritten."""
    last_read = {program.result: len(program.steps)}
    for index, step in enumerate(program.steps):
        for read in (step.input, step.other):
            if read >= 0:
                last_read[read] = max(index, last_read.get(read, 0))
    offsets: dict[int, int] = {}
    taken: list[tuple[int, int, int]] = []  # begin, end, map
    top = 0
    for index, step in enumerate(program.steps):
        if step.out not in chosen:
            continue
        taken = sorted(piece for piece in taken if last_read.get(piece[2], -1) >= index)
        shape = program.maps[step.out]
        size = -(-shape.channels * shape.pixels // ALIGNMENT) * ALIGNMENT
        begin = 0
        for other_begin, other_end, _ in taken:
            if begin + size <= other_begin:
                break
            begin = max(begin, other_end)
        offsets[step.out] = begin
        taken.append((begin, begin + size, step.out))
        top = max(top, begin + size)
    return offsets, top


def _scratch(program: Program) -> int:
    """Floats that the hungriest step needs beside the maps."""
    need = [0]
    for step in program.steps:
        if step.kind == GATE:
            need.append(step.numbers["hidden"])
        elif step.kind in (MAX_POOL, MEAN_POOL):
            need.append(program.maps[step.input].width + 2 * step.numbers["padding"])
        elif step.kind == CONVOLVE:
            numbers, out = step.numbers, program.maps[step.out]
            # A window reaches (kernel - 1) / stride rows beyond its first, and one more where it is not aligned.
            rows = min(numbers["rows"], out.height) + (numbers["kernel_h"] - 1) // numbers["stride"] + 2
            row = laid_out(numbers["kernel_h"], numbers["kernel_w"], numbers["stride"], out.width)
            # Each of its planes ends with a whole vector.
            ends = numbers["kernel_w"] * numbers["kernel_h"] * ALIGNMENT
            need.append(program.maps[step.input].channels * (rows * row + ends))
    return max(need)
