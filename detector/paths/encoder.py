"""Images -> what one forward pass of a decoupled network leaves behind as evidence."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detector.batches import device_of, to_tensor
from detector.datasets import ImageSet
from detector.network.decouple import GatedNet
from detector.network.gates import inputs_of, logits_of
from detector.paths.gate_inputs import GateInputs
from detector.paths.path_encoding import PathEncoding
from detector.workers import IN_PROCESS, Workers

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One forward pass over a batch of images.

    Attributes:
        class_logits: `float32`, `(images, classes)`.
        gate_logits: `u` of all gates side by side, `float32`, `(images, total channels)`.
        path: the calculation paths: True where a gate logit is above zero.
        inputs: what the gates read.
    """

    class_logits: Floats
    gate_logits: Floats
    path: PathEncoding
    inputs: GateInputs

    def __len__(self) -> int:
        return len(self.path)

    def at(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64] | slice) -> "Evidence":
        """The images at these places, in order."""
        return Evidence(
            self.class_logits[chosen],
            self.gate_logits[chosen],
            PathEncoding(self.path.bits[chosen], self.path.layers),
            GateInputs(self.inputs.means[chosen], self.inputs.reads),
        )

    @classmethod
    def stacked(cls, parts: Iterable["Evidence"]) -> "Evidence | None":
        """The evidence of the images of `parts`, in order; None where there are none."""
        kept = list(parts)
        if not kept:
            return None
        return cls(
            np.concatenate([part.class_logits for part in kept]),
            np.concatenate([part.gate_logits for part in kept]),
            PathEncoding.stacked([part.path for part in kept]),
            GateInputs.stacked([part.inputs for part in kept]),
        )


def encode(network: GatedNet, images: Tensor) -> Evidence:
    """One forward pass in inference mode; `network` must be in evaluation mode.

    Args:
        network: the decoupled network.
        images: in [0, 1], `(batch, channels, height, width)`.
    """
    with torch.inference_mode():
        logits, readings = network.trace(images)
        class_logits, gate_logits, means = (
            part.float().cpu().numpy() for part in (logits, logits_of(readings), inputs_of(readings))
        )
    reads = {name: reading.inputs.shape[1] for name, reading in readings.items() if reading.inputs is not None}
    path = PathEncoding(gate_logits > 0, network.layers)
    return Evidence(class_logits, gate_logits, path, GateInputs(means, reads))


def encode_set(
    network: GatedNet, images: ImageSet, batch: int = 500, workers: Workers = IN_PROCESS
) -> Iterator[Evidence]:
    """The evidence of `images`, one batch in memory at a time; of each worker, where others do it."""
    return workers.map(_Encoding(network, images, batch), range(0, len(images), batch))


@dataclass(frozen=True, slots=True)
class _Encoding:
    """What every worker holds; called, it gives what encodes the batch from a position on."""

    network: GatedNet
    images: ImageSet
    batch: int

    def __call__(self) -> Callable[[int], Evidence]:
        self.network.eval()

        def encode_from(start: int) -> Evidence:
            pixels = self.images.pixels(slice(start, start + self.batch))
            return encode(self.network, to_tensor(pixels, device_of(self.network)))

        return encode_from
