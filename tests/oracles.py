"""Models whose answer to an attack is known in advance."""

import torch
from torch import Tensor, nn

from attacks.adaptive.defence import Defence, Guides, Seen


class MeanBoundary(nn.Module):
    """Class 1 where the mean pixel exceeds `level`, else class 0.

    The nearest image on the other side is known exactly: every pixel moves by `level - mean`, so its L-inf distance is
    that, and its L2 distance is that times the square root of the number of pixels.
    """

    def __init__(self, level: float = 0.5, sharpness: float = 20.0) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))
        self.sharpness = sharpness

    def forward(self, images: Tensor) -> Tensor:
        above = self.sharpness * (images.mean(dim=(1, 2, 3)) - self.level)
        return torch.stack([-above, above], dim=1)


class NearestCorner(nn.Module):
    """Three classes by the first two pixels, linear: class 0 near the origin, 1 and 2 along one pixel each."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        zero = torch.zeros_like(flat[:, 0])
        return self.scale * torch.stack([zero, flat[:, 0] - 0.5, flat[:, 1] - 0.7], dim=1)


class WeightedSum(nn.Module):
    """Class 1 where the weighted sum of the pixels exceeds `level`, else class 0: linear, each pixel of other weight.

    The least L1 change moves the heaviest pixels to the end of their range, as few of them as will do.
    """

    def __init__(self, weights: Tensor, level: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.level = level

    def forward(self, images: Tensor) -> Tensor:
        above = images.flatten(1) @ self.weights - self.level
        return torch.stack([-above, above], dim=1)


class NeverFooled(nn.Module):
    """Always class 0, with a gradient that leads nowhere useful."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        slight = 1e-3 * self.weight * images.mean(dim=(1, 2, 3))
        return torch.stack([5 - slight, slight, -slight], dim=1)


def grey_images(level: float, count: int = 4, size: int = 12) -> Tensor:
    """`count` images of one grey level, `(count, 1, size, size)`."""
    return torch.full((count, 1, size, size), level)


def halves_watched(
    network: nn.Module, limit: float, guides: Tensor, blind: bool = False, surrogate_sees: bool = True
) -> Defence:
    """A detector that flags an image where the mean of its left half exceeds `limit`.

    The way round it is known exactly: for a network that looks at the whole mean, an image moves its right half alone,
    and the mean by half of that. The gates are the means of the two halves.

    Args:
        network: images -> logits.
        limit: of the left half's mean, in [0, 1].
        guides: images that look as they should, `(images, channels, height, width)`.
        blind: whether the detector flags nothing after all.
        surrogate_sees: False for an attacker whose idea of the detector is that it never flags.
    """

    def left(images: Tensor) -> Tensor:
        return images[..., : images.shape[-1] // 2].mean(dim=(1, 2, 3))

    def gates(images: Tensor) -> Tensor:
        return 20 * torch.stack([left(images), images[..., images.shape[-1] // 2 :].mean(dim=(1, 2, 3))], dim=1)

    def score(images: Tensor) -> Tensor:
        return left(images) - limit if not blind else left(images) - 2

    def see(images: Tensor) -> Seen:
        seen = score(images) if surrogate_sees else 0 * left(images) - 1
        return Seen(network(images), seen, gates(images))

    def judge(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return network(images).argmax(dim=1), score(images).double()

    with torch.no_grad():
        known = Guides(guides, network(guides).argmax(dim=1), gates(guides))
    return Defence(see, judge, 0.0, 0.01, surrogate_sees, 1.0, known)
