"""Networks in ONNX Runtime, the peer of torch eager for serving: one thread, one image at a time."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from detector.network.decouple import GatedNet
from detector.network.gates import logits_of


class WithGateLogits(nn.Module):
    """A decoupled network whose second output is all gate logits side by side, as a verdict needs them."""

    def __init__(self, network: GatedNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] -> logits `(batch, classes)` and gate logits `(batch, total filters)`."""
        logits, readings = self.network.trace(images)
        return logits, logits_of(readings)


def onnx_call(network: nn.Module, images: Tensor) -> Callable[[], object] | None:
    """A call of `network`, in evaluation mode, on `images` in ONNX Runtime; None where that is not installed."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ModuleNotFoundError:
        return None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        file = Path(folder) / "network.onnx"
        with torch.no_grad():
            torch.onnx.export(network, (images,), file, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, given)
