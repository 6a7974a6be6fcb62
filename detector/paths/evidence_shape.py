"""How wide a network's evidence is, and the evidence as rows of numbers, there and back.

Scikit-learn takes one row an image: class logits, gate logits and gate inputs of all layers side by side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from detector.paths.encoder import Evidence, Floats
from detector.paths.gate_inputs import GateInputs
from detector.paths.path_encoding import PathEncoding

Layers = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class EvidenceShape:
    """How wide the evidence of a network is.

    Attributes:
        classes: of the network.
        layers: gate name -> its filters, in network order.
        reads: gate name -> channels that it reads, in network order; empty where gates read nothing.
    """

    classes: int
    layers: Layers
    reads: Layers = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """Of `rows_of`."""
        return self.classes + sum(self.layers.values()) + sum(self.reads.values())

    def evidence(self, rows: Floats) -> Evidence:
        """The evidence that `rows_of` gives these rows of, `(images, columns)`."""
        ends = np.cumsum([self.classes, sum(self.layers.values())])
        class_logits, gate_logits, means = np.split(rows, ends, axis=1)
        path = PathEncoding(gate_logits > 0, self.layers)
        return Evidence(class_logits, gate_logits, path, GateInputs(means, self.reads))

    @classmethod
    def of(cls, evidence: Evidence) -> "EvidenceShape":
        """Of the network that left this behind."""
        return cls(evidence.class_logits.shape[1], evidence.path.layers, evidence.inputs.reads)


def rows_of(evidence: Evidence) -> Floats:
    """Class logits, gate logits, gate inputs of each image, `float32`, `(images, columns of the shape)`."""
    return np.concatenate([evidence.class_logits, evidence.gate_logits, evidence.inputs.means], axis=1)
