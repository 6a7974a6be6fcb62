"""What the detector says about images; needs no torch, so that whoever only passes it on stays light."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detector.paths.path_encoding import PathEncoding


@dataclass(frozen=True, slots=True)
class Detections:
    """What one forward pass says about a batch of images.

    Attributes:
        labels: predicted class, `int64`, `(images,)`.
        probabilities: softmax over the classes, `float32`, `(images, classes)`.
        scores: adversarial score, unbounded, larger is more suspicious, `float64`, `(images,)`.
        p_values: share of clean calibration images at least as suspicious, in (0, 1], `float64`, `(images,)`.
        paths: the calculation paths, `images` rows.
    """

    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float64]
    p_values: npt.NDArray[np.float64]
    paths: PathEncoding
