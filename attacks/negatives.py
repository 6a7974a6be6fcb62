"""Recipes that aim at nothing: common corruptions, and noise as long as an attack's change.

A detector should let their images pass where the network still gets them right; what it flags of them is a false alarm.
They go through the same crafting, rounding and store as attacks.
"""

from torch import Tensor

from attacks.corruptions import CORRUPTIONS, SEVERITIES
from attacks.noise import MatchedNoise
from attacks.problem import Problem
from attacks.recipes import Recipe
from detector.batches import to_pixels, to_tensor
from detector.errors import RequestError


class Corrupted:
    """One of the fifteen corruptions of CIFAR-10-C at one severity."""

    def __init__(self, corruption: str, severity: int) -> None:
        """A corruption.

        Args:
            corruption: its name, in `attacks.corruptions.CORRUPTIONS`.
            severity: from 1 to 5.

        Raises:
            RequestError: there is no such corruption.
        """
        if corruption not in CORRUPTIONS:
            raise RequestError(f"expected a corruption of {', '.join(CORRUPTIONS)}; got {corruption!r}")
        self.corruption = CORRUPTIONS[corruption]
        self.severity = severity

    def __call__(self, problem: Problem) -> Tensor:
        """The corrupted images in [0, 1]."""
        seeds = [problem.draws.of(row).initial_seed() for row in range(len(problem))]
        damaged = self.corruption(to_pixels(problem.images), self.severity, seeds)
        return to_tensor(damaged, problem.images.device).to(problem.images.dtype)


# `gaussian_noise-1` to `jpeg_compression-5`.
CORRUPTED = tuple(
    Recipe(f"{name}-{severity}", None, None, Corrupted, {"corruption": name, "severity": severity})
    for name in CORRUPTIONS
    for severity in SEVERITIES
)


def noise_like(recipe: Recipe) -> Recipe:
    """`noise-NAME`: Gaussian noise as long, image by image, as the stored changes of the recipe `NAME`, and on as many.

    Raises:
        RequestError: the recipe is noise or a corruption itself.
    """
    if not recipe.is_attack:
        raise RequestError(f"expected an attack for noise as long as its changes, got {recipe.name}")
    return Recipe(
        f"noise-{recipe.name}",
        None,
        None,
        MatchedNoise,
        matches=recipe.name,
        costly=recipe.costly,
        images=recipe.images,
    )
