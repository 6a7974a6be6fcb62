"""Every baseline, one line each."""

from torch import Tensor

from detector.baselines.activations import ActivationReader
from detector.baselines.baseline import Baseline
from detector.baselines.critical_paths import CriticalPaths
from detector.baselines.effective_path import EffectivePaths
from detector.baselines.kernel_density import KernelDensities
from detector.baselines.lid import LocalDimensions
from detector.baselines.mahalanobis import Mahalanobis
from detector.baselines.pooled import PooledActivations
from detector.baselines.softmax import MaxSoftmax
from detector.baselines.squeezing import FeatureSqueezing
from detector.network.decouple import GatedNet


def all_baselines(network: GatedNet, example: Tensor, seed: int = 0) -> list[Baseline]:
    """The baselines for one network.

    Args:
        network: in evaluation mode.
        example: an image that it takes, `(1, channels, height, width)`.
        seed: of those that draw at random.

    Raises:
        RequestError: the network does not end with a linear layer.
    """
    reader = ActivationReader(network, example)
    return [
        MaxSoftmax(reader),
        PooledActivations(reader),
        Mahalanobis(reader),
        KernelDensities(reader),
        LocalDimensions(reader),
        FeatureSqueezing(network),
        EffectivePaths(network, reader.classes),
        CriticalPaths(network, seed),
    ]
