"""How far the answer moves when the image is simplified (Xu et al., "Feature Squeezing", NDSS 2018).

Their joint detector: the largest L1 distance between the probabilities for the image and for it with fewer bits, median
filtered, and denoised by non-local means. For grey images they leave the last one out and keep one bit, which is what
MNIST bears; here all images are treated as their CIFAR-10 ones.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from detector.baselines.baseline import Observed
from detector.baselines.torch_score import TorchScore, Trace
from detector.network.decouple import GatedNet
from detector.network.gates import logits_of
from detector.paths.encoder import Floats

# Their setting for CIFAR-10: bit_depth_5, median_filter_2_2, non_local_means_color_13_3_2.
BITS, MEDIAN, SEARCH, PATCH, STRENGTH = 5, 2, 13, 3, 2 / 255


class FeatureSqueezing:
    """Suspicious where squeezing changes the probabilities; nothing is fitted."""

    name, sees, images = "feature squeezing", "squeezed images", 500

    def __init__(self, network: GatedNet) -> None:
        self._network = network

    def observe(self, images: Tensor) -> Floats:
        """The L1 distance for each of the three squeezers."""
        with torch.inference_mode():
            rows: Floats = self.trace(images).rows.float().cpu().numpy()
        return rows

    def trace(self, images: Tensor) -> Trace:
        """The same, with a gradient where the images want one: rounding has none, denoising next to none, and both
        give back nearly the image, so that theirs is the image's own (Athalye et al., "Obfuscated Gradients", 2018)."""
        logits, readings = self._network.trace(images)
        with torch.no_grad():
            fewer, denoised = fewer_bits(images), non_local_means(images)
        through = images - images.detach()  # nothing, with the image's gradient
        plain = logits.softmax(dim=1)
        moved = [
            (self._network(squeezed).softmax(dim=1) - plain).abs().sum(dim=1)
            for squeezed in (fewer + through, median_filtered(images), denoised + through)
        ]
        gates = logits_of(readings)
        return Trace(logits, gates, torch.stack(moved, dim=1))

    def fit(self, clean: Observed, attacked: Mapping[str, Observed]) -> TorchScore:  # noqa: ARG002
        """The largest of the three."""
        return TorchScore(lambda rows: rows.amax(dim=1).double(), self.trace)


def fewer_bits(images: Tensor) -> Tensor:
    """Images in [0, 1] with `BITS` bits a value."""
    levels = 2**BITS - 1
    fewer: Tensor = (images * levels).round() / levels
    return fewer


def median_filtered(images: Tensor) -> Tensor:
    """Each value replaced by the median of its 2 x 2 window, the upper of the two in the middle, as SciPy has it."""
    padded = F.pad(images, (1, 0, 1, 0), mode="replicate")  # what SciPy calls "reflect"
    windows = padded.unfold(2, MEDIAN, 1).unfold(3, MEDIAN, 1).flatten(4)
    median: Tensor = windows.sort(dim=4).values[..., MEDIAN * MEDIAN // 2]
    return median


def non_local_means(images: Tensor) -> Tensor:
    """Each pixel replaced by the mean of those around it whose neighbourhoods look alike (Buades et al. 2005)."""
    half, reach = SEARCH // 2, PATCH // 2
    padded = F.pad(images, (half,) * 4, mode="reflect")
    height, width = images.shape[2:]
    total, weights = torch.zeros_like(images), torch.zeros_like(images[:, :1])
    for down in range(SEARCH):
        for right in range(SEARCH):
            other = padded[:, :, down : down + height, right : right + width]
            apart = (other - images).square().mean(dim=1, keepdim=True)
            alike = F.avg_pool2d(F.pad(apart, (reach,) * 4, mode="reflect"), PATCH, 1)
            weight = torch.exp(-alike / STRENGTH**2)
            total, weights = total + weight * other, weights + weight
    return total / weights
