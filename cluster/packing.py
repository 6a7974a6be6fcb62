"""Batches and their answers as bytes, as they travel between the edge and a replica.

Ray hands bytes on as they are. Arrays and dataclasses go through its serialiser, one by one, on both ways.
"""

import struct
from collections.abc import Mapping
from typing import Final

import numpy as np

from detector.images import Pixels
from detector.paths.path_encoding import PathEncoding
from detector.scoring.detections import Detections

_SHAPE: Final = struct.Struct("<4I")
_COUNT: Final = struct.Struct("<I")


def packed_pixels(pixels: Pixels) -> bytes:
    """`uint8` `(images, height, width, channels)` -> bytes."""
    return _SHAPE.pack(*pixels.shape) + pixels.tobytes()


def unpacked_pixels(packed: bytes) -> Pixels:
    """The inverse of `packed_pixels`; not for writing."""
    return np.frombuffer(packed, np.uint8, offset=_SHAPE.size).reshape(_SHAPE.unpack_from(packed))


class AnswerPacking:
    """The answers of one model as bytes: how many took its whole network, then one row of numbers for each image."""

    def __init__(self, classes: int, layers: Mapping[str, int]) -> None:
        """Both ends make it of the same.

        Args:
            classes: of the model.
            layers: gate name -> its channels, in network order.
        """
        self._layers = layers
        self._row = np.dtype(
            [
                ("label", np.int64),
                ("probabilities", np.float32, (classes,)),
                ("score", np.float64),
                ("p_value", np.float64),
                ("path", np.uint8, ((sum(layers.values()) + 7) // 8,)),
            ]
        )

    def packed(self, detections: Detections, in_full: int) -> bytes:
        """What `unpacked` gives back.

        Args:
            detections: about a batch.
            in_full: how many of its images took the whole network.
        """
        rows = np.empty(len(detections.labels), self._row)
        rows["label"], rows["probabilities"] = detections.labels, detections.probabilities
        rows["score"], rows["p_value"] = detections.scores, detections.p_values
        rows["path"] = detections.paths.packed()
        return _COUNT.pack(in_full) + rows.tobytes()

    def unpacked(self, packed: bytes) -> tuple[Detections, int]:
        """The inverse of `packed`; the arrays are not for writing."""
        (in_full,) = _COUNT.unpack_from(packed)
        rows = np.frombuffer(packed, self._row, offset=_COUNT.size)
        paths = PathEncoding.unpacked(rows["path"], self._layers)
        return Detections(rows["label"], rows["probabilities"], rows["score"], rows["p_value"], paths), in_full
