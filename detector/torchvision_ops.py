"""Import torchvision beside any build of torch.

torchvision's published wheel is built against a CUDA torch. Beside a CPU-only torch its compiled extension does not
load, and `import torchvision` then stops at `operator torchvision::nms does not exist`, because it registers
meta-kernels for operators that the extension would have defined. So the real extension is tried first; only where it
fails, the schemas of the two operators are declared (declaring them where the extension loads aborts the process).
Data sets and models then work; torchvision's own image decoders and box operators do not: decode with Pillow.
"""

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a Library takes its schemas back when it is collected


@cache
def import_torchvision(submodule: str = "") -> ModuleType:
    """torchvision, or one of its submodules (`"datasets"`), importable whichever torch is installed."""
    if not _libraries and not _load_extension():
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _libraries.append(library)
    return importlib.import_module(f"torchvision.{submodule}" if submodule else "torchvision")


def _load_extension() -> bool:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return False
    for extension in sorted(Path(found.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return True
    return False
