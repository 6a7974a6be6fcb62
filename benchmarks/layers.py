"""What each layer of a batch takes in the compiled kernel: image by image, together, and with all filters open.

What `detector.engines.together` chooses by, and what masking would take in the kernel's own loops.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.report import Row
from detector.engines.kernel import KernelEngine
from detector.engines.program import CONVOLVE, GATE, LINEAR, MAX_POOL, MEAN_POOL, Program
from detector.images import Pixels

ALONE, TOGETHER, OPEN = "one by one, ms", "together, ms", "all open, ms"
_KINDS = {CONVOLVE: "convolution", LINEAR: "linear", MAX_POOL: "pooling", MEAN_POOL: "pooling"}


def measure(program: Program, images: Pixels, repetitions: int) -> list[dict[str, Any]]:
    """A row for each convolution, linear map and pooling, with what lies behind its gate, and one for all the rest.

    Args:
        program: of a decoupled network.
        images: a batch.
        repetitions: of each way; the least time of each step counts, divided by the images.
    """
    engine = KernelEngine(program)
    alone, together = engine.step_milliseconds(images, [(), range(len(program.steps))], repetitions) / len(images)
    del engine
    [opened] = KernelEngine(_all_open(program)).step_milliseconds(images, [()], repetitions) / len(images)
    rest = np.zeros(3)
    rows = []
    for number, (step, *times) in enumerate(zip(program.steps, alone, together, opened, strict=True)):
        if step.kind in _KINDS:
            before, after = program.maps[step.input], program.maps[step.out]
            size = f"{before.channels} to {after.channels}, {after.height} x {after.width}"
            rows.append(_row(f"{number + 1}", f"{_KINDS[step.kind]} {size}", times))
        else:
            rest += times
    return [*rows, _row("", "gates and others", rest.tolist())]


def rows_of(name: str, found: Sequence[Mapping[str, Any]], images: int) -> Iterator[Row]:
    """The whole network's times, and what the faster way of each step would take."""
    for column in (ALONE, TOGETHER, OPEN):
        total = sum(row[column] for row in found)
        yield Row(figure=f"{name}, kernel, each of {images} images: {column}", value=total)
    best = sum(min(row[ALONE], row[TOGETHER]) for row in found)
    yield Row(figure=f"{name}, kernel, each of {images} images: the faster way of each step, ms", value=best)


def _row(number: str, layer: str, times: Sequence[float]) -> dict[str, Any]:
    return {"step": number, "layer": layer, **dict(zip((ALONE, TOGETHER, OPEN), map(float, times), strict=True))}


def _all_open(program: Program) -> Program:
    """The same network with gates that open every filter of every image."""
    steps = []
    for step in program.steps:
        if step.kind == GATE:
            arrays = dict(step.arrays)
            arrays |= {"weights": np.zeros_like(arrays["weights"]), "biases": np.ones_like(arrays["biases"])}
            step = replace(step, arrays=arrays)
        steps.append(step)
    return replace(program, steps=tuple(steps))
