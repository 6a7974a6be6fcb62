"""The engine that skips: only the filters that an image opens, read from only the channels that it opened before.

One call of a compiled library (kernel.c) answers label, path and score. The library is built when Pathguard is
installed, if there is a C compiler; without one this engine is not there, and another is chosen.
"""

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from detector.engines.engine import Answers
from detector.engines.kernel_score import KernelScore
from detector.engines.library import MapLayout, ProgramLayout, StepLayout, layout_of, library
from detector.engines.program import ALIGNMENT, CONVOLVE, GATE, Program
from detector.errors import ImageError
from detector.images import Pixels
from detector.paths.encoder import Evidence
from detector.paths.path_encoding import PathEncoding
from detector.scoring.compiled_score import LinearScore

_VECTOR_BYTES = 64


class KernelEngine:
    """A decoupled network in the compiled kernel."""

    name = "kernel"

    def __init__(self, program: Program, score: LinearScore | None = None, threads: int = 1) -> None:
        """Find room for the feature maps of `program`.

        Args:
            program: of the decoupled network.
            score: what turns a path into a score in the same call; None for no scores.
            threads: among which the images of a batch are divided; one image takes one.

        Raises:
            EngineError: the library was not built.
        """
        self._run = library().pathguard_run
        self._program = program
        self._image_bytes = program.maps[0].pixels * program.maps[0].channels
        self._widest = max(shape.channels for shape in program.maps)
        self._score = score
        offsets, floats = _places(program)
        self._maps = (MapLayout * len(program.maps))()
        marks = 0
        for layout, shape, offset in zip(self._maps, program.maps, offsets, strict=True):
            layout.data, layout.open = offset, marks
            layout.channels, layout.height, layout.width = shape.channels, shape.height, shape.width
            marks += shape.channels
        # The compiled code reads them where they lie: kept for as long as the engine.
        self._arrays = [{name: _aligned(array) for name, array in step.arrays.items()} for step in program.steps]
        self._steps = (StepLayout * len(program.steps))(*map(layout_of, program.steps, self._arrays))
        self._layout = ProgramLayout(
            maps=ctypes.addressof(self._maps), steps=ctypes.addressof(self._steps), steps_count=len(program.steps),
            classes=program.classes, filters=program.filters, result=program.result, marks=marks, scratch=floats,
        )  # fmt: skip
        # The last vectors of a convolution may read, and drop, what lies behind the map.
        self._floats = floats + _scratch(program) + 256
        if score is not None:
            self._kernel_score = KernelScore(score)
            self._layout.score = ctypes.addressof(self._kernel_score.layout)
            self._floats = floats + max(_scratch(program), self._kernel_score.room) + 256
        self._arenas: list[npt.NDArray[np.float32]] = []
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kernel") if threads > 1 else None
        self._parts = threads

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
        count, classes, filters = len(pixels), self._program.classes, self._program.filters
        class_logits = np.empty((count, classes), np.float32)
        gate_logits = np.empty((count, filters), np.float32)
        bits = np.empty((count, filters), np.bool_)
        scores = np.empty(count, np.float64) if self._score is not None else None
        if self._threads is None or count < 2:
            self._answer(pixels, class_logits, gate_logits, bits, scores)
        else:

            def run(part: slice) -> None:
                own_scores = None if scores is None else scores[part]
                self._answer(pixels[part], class_logits[part], gate_logits[part], bits[part], own_scores)

            ends = np.linspace(0, count, min(self._parts, count) + 1).astype(int).tolist()
            list(self._threads.map(run, [slice(begin, end) for begin, end in pairwise(ends)]))
        return Answers(Evidence(class_logits, gate_logits, PathEncoding(bits, self._program.layers)), scores)

    def _answer(
        self,
        pixels: Pixels,
        class_logits: npt.NDArray[np.float32],
        gate_logits: npt.NDArray[np.float32],
        bits: npt.NDArray[np.bool_],
        scores: npt.NDArray[np.float64] | None,
    ) -> None:
        """Write what there is to say about `pixels` into the other arrays; the library lets other threads run."""
        with self._lock:
            arena = self._arenas.pop() if self._arenas else _aligned(np.zeros(self._floats, np.float32))
        failed = self._run(
            ctypes.byref(self._layout), len(pixels), self._image_bytes, self._widest, pixels.ctypes.data,
            arena.ctypes.data, class_logits.ctypes.data, gate_logits.ctypes.data, bits.ctypes.data,
            None if scores is None else scores.ctypes.data,
        )  # fmt: skip
        with self._lock:
            self._arenas.append(arena)
        if failed:
            raise MemoryError("expected room for the marks of a path, got none")


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


def _places(program: Program) -> tuple[list[int], int]:
    """The offset of each map in the arena, in floats, and where they end; maps that are done with are overwritten."""
    last_read = {program.result: len(program.steps)}
    for index, step in enumerate(program.steps):
        for read in (step.input, step.other):
            if read >= 0:
                last_read[read] = max(index, last_read.get(read, 0))
    offsets = [0] * len(program.maps)
    taken: list[tuple[int, int, int]] = []  # begin, end, map
    top = 0
    for index, step in enumerate(program.steps):
        if step.kind == GATE:
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
        elif step.kind == CONVOLVE:
            numbers, out = step.numbers, program.maps[step.out]
            # A window reaches (kernel - 1) / stride rows beyond its first, and one more where it is not aligned.
            rows = min(numbers["rows"], out.height) + (numbers["kernel_h"] - 1) // numbers["stride"] + 2
            planes = numbers["kernel_w"] * min(numbers["stride"], numbers["kernel_h"])
            plane = -(-rows * out.width // 16) * 16
            need.append(program.maps[step.input].channels * planes * plane)
    return max(need)
