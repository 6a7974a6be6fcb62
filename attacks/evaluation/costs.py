"""What the answer with its evidence costs beside the plain backbone's answer, in the same run."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import fx, nn

from detector.batches import best_device, to_tensor
from detector.bundle import Bundle
from detector.datasets import Splits
from detector.engines.masked import MaskedEngine
from detector.images import Pixels
from detector.network.decouple import GatedNet
from detector.network.folding import fold_graph
from detector.network.macs import cost_of
from detector.paths.encoder import encode
from detector.scoring.detector import Detector

BATCHES = (1, 32)
WARMING = 5


def cost_rows(bundle: Bundle, network: GatedNet, splits: Splits, seconds: float) -> list[dict[str, object]]:
    """A row for each batch size: times of both, side by side, multiply-accumulates and weights of both.

    Like is compared with like: both in torch eager with their normalisations folded, warmed up, from pixels to an
    answer on the host. What the engine that serves takes stands in columns of its own.

    Args:
        bundle: with a detector.
        network: its decoupled network, in evaluation mode.
        splits: the data, for images to measure with.
        seconds: how long each batch size is measured.
    """
    device = best_device()
    masked, served = Detector(bundle, engine=MaskedEngine.name), Detector(bundle)
    backbone = _folded(bundle.backbone()).to(device)
    rows: list[dict[str, object]] = []
    for batch in BATCHES:
        pixels = splits.calibration.pixels(slice(0, batch))
        images = to_tensor(pixels, device)
        cost = cost_of(network, images[:1])
        own = float(cost.of(encode(network, images).path).mean())

        def plain(pixels: Pixels) -> object:
            with torch.inference_mode():
                return backbone(to_tensor(pixels, device)).cpu()  # waits for the device, as an answer does

        calls = (masked.detect, plain, served.detect)
        ours, theirs, quickest = _interleaved([partial(call, pixels) for call in calls], seconds)
        rows.append({
            "images at a time": batch, "detector, ms": 1000 * ours, "backbone, ms": 1000 * theirs,
            "ratio": ours / theirs, "served by": served.choice.for_images(batch).name, "served, ms": 1000 * quickest,
            "million MACs of the path": own / 1e6,
            "million MACs of the backbone": cost.dense / 1e6,
            "million weights": sum(w.numel() for w in network.parameters()) / 1e6,
            "million weights of the backbone": sum(w.numel() for w in bundle.backbone().parameters()) / 1e6,
        })  # fmt: skip
    return rows


def _folded(backbone: nn.Module) -> nn.Module:
    """A copy with its normalisations folded; as it is where torch.fx cannot trace it, like the detector's network."""
    try:
        graph = fx.symbolic_trace(copy.deepcopy(backbone).eval())
    except Exception:  # whatever the network's own code does with a tensor that has no values
        return backbone
    fold_graph(graph)
    return graph


def _interleaved(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of each, called in turn; the first `WARMING` rounds do not count."""
    taken: list[list[float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < WARMING + 5:
        taken.append([])
        for call in calls:
            began = time.perf_counter()
            call()
            taken[-1].append(time.perf_counter() - began)
    return [statistics.median(times) for times in zip(*taken[WARMING:], strict=True)]
