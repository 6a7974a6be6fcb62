"""The compiled library (kernel.c), and the structs that it shares with Python.

It is built when Pathguard is installed, if there is a C compiler.
"""

import ctypes
import importlib.util
from functools import cache
from typing import Any

from detector.errors import EngineError

LIBRARY = "detector.engines._kernel"


class ProgramLayout(ctypes.Structure):
    """`struct program`."""

    _fields_ = (
        ("maps", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("steps_count", ctypes.c_int32),
        ("classes", ctypes.c_int32),
        ("filters", ctypes.c_int32),
        ("result", ctypes.c_int32),
        ("marks", ctypes.c_int64),
        ("scratch", ctypes.c_int64),
        ("floats", ctypes.c_int64),
        ("score", ctypes.c_void_p),
    )


@cache
def library() -> Any:
    """The compiled library, set to the widest vectors of this processor.

    Raises:
        EngineError: it was not built.
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
    loaded.pathguard_use.argtypes, loaded.pathguard_use.restype = [ctypes.c_char_p], ctypes.c_char_p
    loaded.pathguard_run.restype = ctypes.c_int
    loaded.pathguard_run.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, *[ctypes.c_void_p] * 6,
    ]  # fmt: skip
    loaded.pathguard_score.restype = None
    loaded.pathguard_score.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 5]
    loaded.pathguard_use(None)
    return loaded
