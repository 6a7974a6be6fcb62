"""What was seen of some images, and which images they are."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detector.paths.encoder import Evidence

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sample:
    """Evidence, and which images it is of.

    Attributes:
        evidence: one row an image.
        ids: index of each image in its source, `int64`, `(images,)`.
    """

    evidence: Evidence
    ids: Ids

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64] | slice) -> "Sample":
        """The images at these places."""
        return Sample(self.evidence.at(chosen), self.ids[chosen])
