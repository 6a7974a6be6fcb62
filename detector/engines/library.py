"""The compiled library (kernel.c), and the structs that it shares with Python.

It is built when Pathguard is installed, if there is a C compiler.
"""

import ctypes
import importlib.util
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy.typing as npt

from detector.engines.program import CONVOLVE, Step
from detector.errors import EngineError

LIBRARY = "detector.engines._kernel"
# As in kernel.c.
VERSION = 7


class MapLayout(ctypes.Structure):
    """`struct map`: where a feature map lies."""

    _fields_ = (
        ("data", ctypes.c_int64),
        ("open", ctypes.c_int64),
        ("channels", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("own", ctypes.c_int32),
    )


class StepLayout(ctypes.Structure):
    """`struct step`."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "kind", "input", "other", "out", "gate", "filters", "relu_before", "relu_after", "kernel_h", "kernel_w",
                "stride", "padding", "hidden", "rows", "count_padding", "together", "first_read",
            )
        ),
        *((name, ctypes.c_void_p) for name in ("weights", "biases", "squeeze", "squeeze_biases", "kept")),
    )  # fmt: skip


class ScoreLayout(ctypes.Structure):
    """`struct score`."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "offsets", "bits", "logits", "margins", "doubts", "path_fit", "gate_fit", "odds", "closed", "centre",
                "whitening", "means", "known", "widths", "hidden", "hidden_offsets", "inputs",
            )
        ),
        ("layers", ctypes.c_int32),
        ("sums", ctypes.c_int32),
        ("benign", ctypes.c_int32),
        ("units", ctypes.c_int32),
    )  # fmt: skip


class ProgramLayout(ctypes.Structure):
    """`struct program`."""

    _fields_ = (
        ("maps", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("steps_count", ctypes.c_int32),
        ("classes", ctypes.c_int32),
        ("filters", ctypes.c_int32),
        ("result", ctypes.c_int32),
        ("reads", ctypes.c_int32),
        ("marks", ctypes.c_int64),
        ("scratch", ctypes.c_int64),
        ("score", ctypes.c_void_p),
        ("own", ctypes.c_int64),
        ("own_size", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )


def layout_of(step: Step, arrays: Mapping[str, npt.NDArray[Any]]) -> StepLayout:
    """`step` as the library reads it; `arrays`, its own or copies, have to be kept for as long as that."""
    layout = StepLayout(kind=step.kind, input=step.input, other=step.other, out=step.out, **step.numbers)
    if step.kind == CONVOLVE and "gate" not in step.numbers:
        layout.gate = -1
    for name, array in arrays.items():
        setattr(layout, name, array.ctypes.data)
    return layout


@cache
def library() -> Any:
    """The compiled library, set to the widest vectors of this processor.

    Raises:
        EngineError: it was not built, or from other sources than these.
    """
    found = importlib.util.find_spec(LIBRARY)
    if found is None or found.origin is None:
        raise EngineError(
            "expected the compiled kernel, got none: it is built when Pathguard is installed on a machine with a C "
            "compiler (`make kernel` in a checkout)"
        )
    try:
        loaded = ctypes.CDLL(found.origin)
    except OSError as error:
        raise EngineError(f"expected a compiled kernel for this machine, got {error}") from None
    layouts = (MapLayout, StepLayout, ScoreLayout, ProgramLayout)
    expected = [VERSION, *map(ctypes.sizeof, layouts)]
    # Structs of another layout would be read all the same, from where other things lie.
    told = getattr(loaded, "pathguard_layout", None)
    if told is not None:
        told.restype = ctypes.POINTER(ctypes.c_int64 * len(expected))
    if told is None or list(told().contents) != expected:
        raise EngineError(
            "expected the compiled kernel of this version, got one built from other sources: install Pathguard anew "
            "(`make kernel` in a checkout)"
        )
    loaded.pathguard_use.argtypes, loaded.pathguard_use.restype = [ctypes.c_char_p], ctypes.c_char_p
    loaded.pathguard_run.restype = ctypes.c_int
    loaded.pathguard_run.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, *[ctypes.c_void_p] * 8,
    ]  # fmt: skip
    loaded.pathguard_score.restype = None
    loaded.pathguard_score.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 6]
    loaded.pathguard_gate.restype = ctypes.c_int32
    loaded.pathguard_gate.argtypes = [
        *[ctypes.c_void_p] * 3, ctypes.c_int32, ctypes.c_int64, *[ctypes.c_void_p] * 4,
    ]  # fmt: skip
    loaded.pathguard_cut.restype = None
    loaded.pathguard_cut.argtypes = [
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32,
        *[ctypes.c_void_p] * 2,
    ]  # fmt: skip
    loaded.pathguard_sum.restype = None
    loaded.pathguard_sum.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32,
        ctypes.c_int32, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p,
    ]  # fmt: skip
    loaded.pathguard_use(None)
    return loaded
