"""What the answer with its evidence costs beside the plain backbone's answer, in the same run."""

import statistics
import time
from collections.abc import Callable

import torch

from detector.batches import best_device, to_tensor
from detector.bundle import Bundle
from detector.datasets import Splits
from detector.network.decouple import GatedNet
from detector.network.macs import cost_of
from detector.paths.encoder import encode
from detector.scoring.detector import Detector

BATCHES = (1, 32)


def cost_rows(bundle: Bundle, network: GatedNet, splits: Splits, seconds: float) -> list[dict[str, object]]:
    """A row for each batch size: times of both, side by side, multiply-accumulates and weights of both.

    Args:
        bundle: with a detector.
        network: its decoupled network, in evaluation mode.
        splits: the data, for images to measure with.
        seconds: how long each batch size is measured.
    """
    device = best_device()
    detector, backbone = Detector(bundle), bundle.backbone().to(device)
    rows: list[dict[str, object]] = []
    for batch in BATCHES:
        pixels = splits.calibration.pixels(slice(0, batch))
        images = to_tensor(pixels, device)
        cost = cost_of(network, images[:1])
        own = float(cost.of(encode(network, images).path).mean())

        def plain(images: torch.Tensor = images) -> object:
            with torch.inference_mode():
                return backbone(images)

        ours, theirs = _interleaved(lambda p=pixels: detector.detect(p), plain, seconds)  # type: ignore[misc]
        rows.append({
            "images at a time": batch, "detector, ms": 1000 * ours, "backbone, ms": 1000 * theirs,
            "ratio": ours / theirs, "million MACs of the path": own / 1e6,
            "million MACs of the backbone": cost.dense / 1e6,
            "million weights": sum(w.numel() for w in network.parameters()) / 1e6,
            "million weights of the backbone": sum(w.numel() for w in backbone.parameters()) / 1e6,
        })  # fmt: skip
    return rows


def _interleaved(one: Callable[[], object], other: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median seconds of each, called in turn."""
    taken: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 5:
        for call, times in zip((one, other), taken, strict=True):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return statistics.median(taken[0]), statistics.median(taken[1])
