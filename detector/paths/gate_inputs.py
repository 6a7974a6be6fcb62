"""What the gates of a decoupled network read of an image: the mean of each channel of their convolutions' inputs.

A gate reads many channels and says one thing about each filter, by way of a few units: what fooled a network shows in
these means as well where it moves no gate. They are there when the path is, at no further cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detector.errors import PathShapeError


@dataclass(frozen=True, slots=True)
class GateInputs:
    """The channel means that all gates read, side by side (`s` of `detector.network.gates.ChannelGate`).

    Attributes:
        means: `float32`, `(images, total channels read)`.
        reads: gate name -> channels that it reads, in network order.

    Raises:
        PathShapeError: `means` is not 2-d, or not as wide as `reads` together.
    """

    means: npt.NDArray[np.float32]
    reads: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.means.ndim != 2 or self.means.shape[1] != sum(self.reads.values()):
            raise PathShapeError(
                f"expected means of shape (images, {sum(self.reads.values())}), got {self.means.shape}"
            )

    @classmethod
    def stacked(cls, parts: Sequence["GateInputs"]) -> "GateInputs":
        """Those of the images of all `parts`, at least one, in order."""
        return cls(np.concatenate([part.means for part in parts]), parts[0].reads)
