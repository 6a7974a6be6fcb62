"""The masked network on an NVIDIA GPU: gates, masks, path and score fused, and recorded as one CUDA graph.

A GPU computes a small network in less time than torch takes to ask for it: a layer with its gate is some ten calls of a
few microseconds each. So torch.compile fuses what stands between the convolutions (activation, shortcut, mask, the
gate's mean), and what is left is recorded once for each size of batch and asked for in one call from then on. It is
recorded by hand: the graphs of torch.compile's own `mode="reduce-overhead"` belong to the thread that made them, and a
server loads a bundle in one thread and answers in another. Filters are not skipped here; docs/speed.md says why.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from detector.batches import device_of, scaled
from detector.engines.engine import Answers
from detector.errors import EngineError
from detector.images import ImageSpec, Pixels
from detector.network.decouple import GatedNet
from detector.network.gates import inputs_of, logits_of
from detector.paths.encoder import Evidence
from detector.paths.gate_inputs import GateInputs
from detector.paths.path_encoding import PathEncoding
from detector.scoring.compiled_score import FoldedScore
from detector.scoring.sums import TorchSums

_log = logging.getLogger(__name__)

# Batches in between are filled up, larger ones are cut.
SIZES = (1, 8, 32)
# Calls before a recording: libraries choose their algorithms and take their memory in the first ones.
_WARM_UP = 3

Outputs = tuple[Tensor, ...]
Function = Callable[[Tensor], Outputs]
# A module and pixels of the size it will be called with -> the same, faster.
Fuse = Callable[[nn.Module, Tensor], Function]
# A function and the memory that its pixels will lie in -> what gives its value for what lies there.
Record = Callable[[Function, Tensor], Callable[[], Outputs]]


def compiled(module: nn.Module, pixels: Tensor) -> Function:
    """`module` by torch.compile, for pixels of this size."""
    # What is exported has code of its own: torch.compile counts its variants by code, and gives up at a few of one.
    exported = torch.export.export(module, (pixels,), strict=False).module()
    made: Function = torch.compile(exported, fullgraph=True, dynamic=False)
    with warnings.catch_warnings():
        # It recommends TensorFloat-32, whose 10 bits would turn gates round (see `detector.batches.best_device`).
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        made(pixels)
    return made


def cuda_graph(function: Function, pixels: Tensor) -> Callable[[], Outputs]:
    """All that `function` asks of a GPU, to be asked for again in one call."""
    # As torch's documentation has it: warmed up and recorded beside the stream on which other threads may be answering.
    stream = torch.cuda.Stream(pixels.device)
    stream.wait_stream(torch.cuda.current_stream(pixels.device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            function(pixels)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        made = function(pixels)

    def run() -> Outputs:
        graph.replay()
        return made

    return run


class CudaEngine:
    """A decoupled network on a GPU, masked, in one call for label, path and score."""

    name = "cuda"

    def __init__(
        self,
        network: GatedNet,
        spec: ImageSpec,
        score: FoldedScore | None = None,
        fuse: Fuse = compiled,
        record: Record = cuda_graph,
    ) -> None:
        """Compile and record `network`, which takes up to minutes the first time.

        Args:
            network: folded, in evaluation mode, on a GPU; it is not copied.
            spec: the images that it takes.
            score: what turns a path into a score in the same call; None for no scores. One that reads likelihoods
                is left to others.
            fuse: makes fewer calls of the network's; where it fails, the network's own are recorded.
            record: its calls.

        Raises:
            EngineError: the network is not on a GPU, or does something that cannot be recorded.
        """
        device = device_of(network)
        if record is cuda_graph and device.type != "cuda":
            raise EngineError(f"expected a network on an NVIDIA GPU, got one on {device}")
        self._layers, self._reads = network.layers, network.reads
        self._scored = score is not None and _Answer.KINDS.issuperset(score.features.kinds)
        answer = _Answer(network, score if self._scored else None).to(device)
        buffers = [_Buffer.of(images, spec, device) for images in SIZES]
        with _RECORDING, torch.no_grad():
            self._recorded = _recorded(answer, buffers, fuse, record)
        self._lock = threading.Lock()

    def answer(self, pixels: Pixels) -> Answers:
        """As `Engine.answer`."""
        most = SIZES[-1]
        parts = [self._answer(pixels[start : start + most]) for start in range(0, max(len(pixels), 1), most)]
        class_logits, gate_logits, means, *scores = (np.concatenate(part) for part in zip(*parts, strict=True))
        path, inputs = PathEncoding(gate_logits > 0, self._layers), GateInputs(means, self._reads)
        evidence = Evidence(class_logits, gate_logits, path, inputs)
        return Answers(evidence, scores[0] if self._scored else None)

    def _answer(self, pixels: Pixels) -> list[npt.NDArray[Any]]:
        count = len(pixels)
        recorded = next(recorded for recorded in self._recorded if len(recorded.buffer.host) >= count)
        with self._lock, torch.no_grad():
            # Behind them lie images of earlier calls: each image is gated alone, and what is said of those is dropped.
            recorded.buffer.host.numpy()[:count] = pixels
            recorded.buffer.device.copy_(recorded.buffer.host, non_blocking=True)
            # The next call writes where these lie. The copy waits for the device.
            return [output[:count].to("cpu", copy=True).numpy() for output in recorded.run()]


# One recording at a time: a process has one tracer, and memory for recordings is set aside in turns.
_RECORDING = threading.Lock()


class _Answer(nn.Module):
    """Pixels -> class logits, gate logits, gate inputs and, with a score, scores."""

    KINDS = frozenset(("bits", "gates", "inputs", "margins"))

    def __init__(self, network: GatedNet, score: FoldedScore | None) -> None:
        super().__init__()
        self.network = network
        self.kinds = () if score is None else tuple(score.features.kinds)
        self.score = None if score is None else TorchSums(score.sums)

    def forward(self, pixels: Tensor) -> Outputs:
        """`uint8` `(images, height, width, channels)` -> `float32` `(images, ...)`; scores `float64`, `(images,)`."""
        class_logits, readings = self.network.trace(scaled(pixels))
        gate_logits, means = logits_of(readings), inputs_of(readings)
        if self.score is None:
            return class_logits, gate_logits, means
        columns = {"bits": gate_logits > 0, "gates": gate_logits, "inputs": means, "margins": _margins(class_logits)}
        # In float64, as scikit-learn sums.
        rows = torch.cat([columns[kind].double() for kind in self.kinds], dim=1)
        return class_logits, gate_logits, means, self.score(rows)


def _margins(class_logits: Tensor) -> Tensor:
    ordered = class_logits.sort(dim=1, descending=True).values
    return ordered[:, :1] - ordered[:, 1:]


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Where the pixels of a batch lie: on the host, where the device can read them by itself, and on the device."""

    host: Tensor
    device: Tensor

    @classmethod
    def of(cls, images: int, spec: ImageSpec, device: torch.device) -> "_Buffer":
        shape = (images, spec.height, spec.width, spec.channels)
        host = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        return cls(host, host.to(device, copy=True))


@dataclass(frozen=True, slots=True)
class _Recorded:
    buffer: _Buffer
    run: Callable[[], Outputs]


def _recorded(answer: _Answer, buffers: Sequence[_Buffer], fuse: Fuse, record: Record) -> list[_Recorded]:
    try:
        return [_Recorded(buffer, record(fuse(answer, buffer.device), buffer.device)) for buffer in buffers]
    except Exception as error:  # there may be no Triton or no C compiler, which are told of in many ways
        _log.warning("the GPU's calls are recorded unfused: expected torch.compile to work, got: %s", _line(error))
    try:
        return [_Recorded(buffer, record(answer, buffer.device)) for buffer in buffers]
    except Exception as error:  # a user's own network may do anything
        raise EngineError(f"expected a network that can be recorded as a CUDA graph, got: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
