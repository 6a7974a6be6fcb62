"""The calculation path of an image, as bits (Li et al., ECCV 2020: "architecture encoding vectors" of all layers)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detector.errors import PathShapeError

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PathEncoding:
    """Open channels of all gates, side by side.

    Attributes:
        bits: True where the channel was open, `(images, total channels)`.
        layers: gate name -> its channels, in network order.

    Raises:
        PathShapeError: `bits` is not boolean, not 2-d, or not as wide as `layers` together.
    """

    bits: Bits
    layers: Mapping[str, int]

    def __post_init__(self) -> None:
        total = sum(self.layers.values())
        if self.bits.dtype != np.bool_ or self.bits.ndim != 2 or self.bits.shape[1] != total:
            raise PathShapeError(
                f"expected boolean bits of shape (images, {total}), got {self.bits.dtype} {self.bits.shape}"
            )

    def __len__(self) -> int:
        return len(self.bits)

    @classmethod
    def side_by_side(cls, parts: Mapping[str, Bits]) -> "PathEncoding":
        """One encoding of the layers' own masks, each `(images, channels)`."""
        if not parts:
            raise PathShapeError("expected at least one gated layer, got none")
        return cls(np.concatenate(list(parts.values()), axis=1), {name: part.shape[1] for name, part in parts.items()})

    def by_layer(self) -> dict[str, Bits]:
        """The mask of each layer, `(images, channels)`: the inverse of `side_by_side`."""
        ends = np.cumsum(list(self.layers.values()))[:-1]
        return dict(zip(self.layers, np.split(self.bits, ends, axis=1), strict=True))

    def packed(self) -> npt.NDArray[np.uint8]:
        """Eight channels a byte, first channel in the highest bit, `(images, ceil(total / 8))`."""
        return np.packbits(self.bits, axis=1)

    @classmethod
    def unpacked(cls, packed: npt.NDArray[np.uint8], layers: Mapping[str, int]) -> "PathEncoding":
        """The inverse of `packed`.

        Raises:
            PathShapeError: too many or too few bytes for the layers.
        """
        total = sum(layers.values())
        if packed.ndim != 2 or packed.shape[1] != (total + 7) // 8:
            raise PathShapeError(f"expected {(total + 7) // 8} bytes for {total} channels, got shape {packed.shape}")
        return cls(np.unpackbits(packed, axis=1, count=total).astype(np.bool_), layers)

    @classmethod
    def stacked(cls, encodings: Sequence["PathEncoding"]) -> "PathEncoding":
        """One encoding of the images of all `encodings`, in order.

        Raises:
            PathShapeError: none are given, or they are of different networks.
        """
        if not encodings or any(dict(e.layers) != dict(encodings[0].layers) for e in encodings):
            raise PathShapeError("expected path encodings of one network, got none or several")
        return cls(np.concatenate([e.bits for e in encodings]), encodings[0].layers)
