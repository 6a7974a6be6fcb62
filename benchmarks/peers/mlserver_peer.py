"""The same detector behind MLServer: `python -m benchmarks.peers.mlserver_peer BUNDLE PORT` in its own environment.

The Open Inference Protocol over gRPC, the model in MLServer's own process: its default of a worker process costs more.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from mlserver import MLModel
from mlserver.cli import main
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

BUNDLE = "MLSERVER_PEER_BUNDLE"


class Runtime(MLModel):
    """Pixels in, labels and p-values out."""

    async def load(self) -> bool:
        """Once, before calls are taken."""
        from detector.bundle import Bundle
        from detector.scoring.detector import Detector

        torch.set_num_threads(1)
        self.detector = Detector(Bundle(Path(os.environ[BUNDLE])))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The detector's answer."""
        detections = self.detector.detect(NumpyCodec.decode_input(payload.inputs[0]))
        outputs = {
            "LABEL": detections.labels,
            "PROBS": detections.probabilities,
            "ADV_SCORE": detections.scores,
            "P_VALUE": detections.p_values,
        }
        return InferenceResponse(
            model_name=self.name,
            outputs=[NumpyCodec.encode_output(name, values) for name, values in outputs.items()],
        )


if __name__ == "__main__":
    bundle, port = sys.argv[1:]
    os.environ[BUNDLE] = bundle
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "host": "127.0.0.1",
            "http_port": int(port) + 1,
            "grpc_port": int(port),
            "metrics_port": int(port) + 2,
            "parallel_workers": 0,
            # Not a line for each call.
            "debug": False,
            "logging_settings": {"version": 1, "root": {"level": "WARNING"}},
        }
        model = {"name": "peer", "implementation": "benchmarks.peers.mlserver_peer.Runtime"}
        (Path(folder) / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        (Path(folder) / "model-settings.json").write_text(json.dumps(model), encoding="utf-8")
        sys.argv = ["mlserver", "start", folder]
        main()
