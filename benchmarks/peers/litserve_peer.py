"""The same detector behind LitServe: `python -m benchmarks.peers.litserve_peer BUNDLE PORT` in its own environment.

A request is JSON with the pixels of any number of images in base 64. LitServe does not batch calls here: a call of one
image would wait for others, and a call of 32 is a batch already.
"""

import base64
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import torch


class Api(litserve.LitAPI):
    """Pixels in, labels and p-values out."""

    def setup(self, device: str) -> None:  # noqa: ARG002
        """In LitServe's worker process."""
        from detector.bundle import Bundle
        from detector.scoring.detector import Detector

        torch.set_num_threads(1)
        self.detector = Detector(Bundle(Path(sys.argv[1])))

    def decode_request(self, request: dict[str, Any]) -> Any:
        """`{"shape": [images, height, width, channels], "pixels": base 64}`."""
        return np.frombuffer(base64.b64decode(request["pixels"]), dtype=np.uint8).reshape(request["shape"])

    def predict(self, pixels: Any) -> Any:
        """The detector's answer."""
        return self.detector.detect(pixels)

    def encode_response(self, detections: Any) -> dict[str, Any]:
        """What a caller of ours gets as well."""
        return {
            "labels": detections.labels.tolist(),
            "probabilities": detections.probabilities.tolist(),
            "scores": detections.scores.tolist(),
            "p_values": detections.p_values.tolist(),
        }


if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=1), accelerator="cpu", workers_per_device=1)
    options = {"num_api_servers": 1, "generate_client_file": False, "log_level": "error"}
    server.run(host="127.0.0.1", port=int(sys.argv[2]), **options)
