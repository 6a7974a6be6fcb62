"""Evidence -> columns for scikit-learn."""

from collections.abc import Callable, Mapping

import numpy as np

from detector.errors import RequestError
from detector.paths.encoder import Evidence, Floats


def path_bits(evidence: Evidence) -> Floats:
    """1 for an open and 0 for a closed filter, `(images, total channels)`."""
    return evidence.path.bits.astype(np.float32)


def gate_logits(evidence: Evidence) -> Floats:
    """How surely each filter is open or closed, `(images, total channels)`."""
    return evidence.gate_logits


def class_margins(evidence: Evidence) -> Floats:
    """By how much the first class leads the second, third, ... in logits, `(images, classes - 1)`."""
    ordered = np.sort(evidence.class_logits, axis=1)[:, ::-1]
    return np.ascontiguousarray(ordered[:, :1] - ordered[:, 1:])


def all_features(evidence: Evidence) -> Floats:
    """Path bits, gate logits and class margins side by side."""
    return np.concatenate([path_bits(evidence), gate_logits(evidence), class_margins(evidence)], axis=1)


Columns = Callable[[Evidence], Floats]

FEATURES: Mapping[str, Columns] = {
    "bits": path_bits,
    "gates": gate_logits,
    "margins": class_margins,
    "all": all_features,
}


def features_named(name: str) -> Columns:
    """The feature function of that name.

    Raises:
        RequestError: the name is unknown.
    """
    if name not in FEATURES:
        raise RequestError(f"expected features of {', '.join(FEATURES)}; got {name!r}")
    return FEATURES[name]
