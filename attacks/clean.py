"""Clean twins of the first attacked images of a split, kept beside them so that a report needs no data set.

A user who has the folder of attacks alone, on another machine or after the photos have moved, still sees what was
changed: sixteen images of CIFAR-10 are 50 kB.

    DIR/SPLIT/clean.safetensors    ids, labels and pixels; the names of the classes in its metadata
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from detector.datasets import ImageSet
from detector.errors import ArtifactError, DataError
from detector.files import write_whole
from detector.images import Pixels

KEPT = 16


@dataclass(frozen=True, slots=True)
class CleanTwins:
    """A few images as they were before any attack.

    Attributes:
        ids: index of each image in its source, `int64`, `(images,)`.
        labels: right labels, `int64`, `(images,)`.
        pixels: `uint8`, `(images, height, width, channels)`.
        class_names: the classes, in the order of their index.
    """

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    pixels: Pixels
    class_names: tuple[str, ...]


def keep_clean(folder: Path, split: str, images: ImageSet) -> None:
    """Keep the first images that are to be attacked, unless the folder has them.

    Args:
        folder: of the store.
        split: its name.
        images: those of the split that are worth attacking.

    Raises:
        DataError: the images cannot be read, or the folder cannot be written.
        ArtifactError: what stands there is damaged.
    """
    first = images.first(KEPT)
    kept = read_clean(folder, split)
    if kept is not None and np.array_equal(kept.ids, first.ids):
        return
    arrays = {"ids": first.ids, "labels": first.labels, "pixels": first.pixels(slice(None))}
    content = save(
        {name: np.ascontiguousarray(values) for name, values in arrays.items()},
        metadata={"class_names": json.dumps(first.class_names)},
    )
    try:
        write_whole(_file(folder, split), content)
    except OSError as error:
        raise DataError(f"expected to write {_file(folder, split)}, got: {error.strerror}") from None


def read_clean(folder: Path, split: str) -> CleanTwins | None:
    """The clean images kept of a split; None where there are none.

    Raises:
        ArtifactError: the file is damaged.
    """
    file = _file(folder, split)
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="numpy") as opened:
            names = json.loads(opened.metadata()["class_names"])
            arrays = {name: opened.get_tensor(name) for name in ("ids", "labels", "pixels")}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"expected clean images in {file}, got damaged content ({error})") from None
    return CleanTwins(**arrays, class_names=tuple(names))


def _file(folder: Path, split: str) -> Path:
    return folder / split / "clean.safetensors"
