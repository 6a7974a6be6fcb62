"""Counts of open filters over any number of images: how often each fires, with which others, and for which class.

Counts are added batch by batch, so that memory depends on filters and classes alone: ten million images take what one
takes. Information is in nats.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from detector.errors import PathShapeError, RequestError
from detector.paths.path_encoding import PathEncoding

Counts = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

# A filter counts as always open above this share of the images, as always closed below the rest; as in
# `detector.paths.path_statistics`.
ALWAYS = 0.99
# Of one product of 0/1 matrices: float32 counts exactly up to 2^24.
_TOGETHER_AT_ONCE = 1 << 20


class Census:
    """How often each filter was open, for each class."""

    def __init__(self, layers: Mapping[str, int], classes: int, together: bool = False) -> None:
        """Nothing counted yet.

        Args:
            layers: gate name -> its filters, in network order.
            classes: how many there are, at least 1.
            together: whether pairs of filters that are open together are counted too, `(filters, filters)`.
        """
        width = sum(layers.values())
        self.layers = dict(layers)
        self.images: Counts = np.zeros(classes, np.int64)
        self.opened: Counts = np.zeros((classes, width), np.int64)
        self.together: Counts | None = np.zeros((width, width), np.int64) if together else None

    def __len__(self) -> int:
        """Images counted."""
        return int(self.images.sum())

    def add(self, path: PathEncoding, labels: npt.NDArray[np.int64]) -> None:
        """Count more images.

        Args:
            path: their paths.
            labels: their classes, `int64`, `(images,)`.

        Raises:
            PathShapeError: the paths are of another network, or there are more or fewer labels than paths.
        """
        if dict(path.layers) != self.layers or labels.shape != (len(path),):
            raise PathShapeError(
                f"expected paths of {sum(self.layers.values())} filters and as many labels, got {path.bits.shape} and "
                f"{labels.shape}"
            )
        self.images += np.bincount(labels, minlength=len(self.images))
        for label in np.unique(labels):
            self.opened[label] += path.bits[labels == label].sum(axis=0, dtype=np.int64)
        if self.together is not None:
            for start in range(0, len(path), _TOGETHER_AT_ONCE):
                bits = path.bits[start : start + _TOGETHER_AT_ONCE].astype(np.float32)
                self.together += (bits.T @ bits).astype(np.int64)

    def rates(self) -> Doubles:
        """Share of all images for which each filter is open, in [0, 1], `(filters,)`.

        Raises:
            RequestError: nothing was counted.
        """
        return np.asarray(self.opened.sum(axis=0) / self._counted(), np.float64)

    def class_rates(self, smoothing: float = 0.0) -> Doubles:
        """Share of each class's images for which each filter is open, `(classes, filters)`; 0.5 for a class of none.

        Args:
            smoothing: images added to each count of open and of closed (1: Laplace), so that no rate is 0 or 1.
        """
        images = self.images[:, None] + 2 * smoothing
        return np.asarray(
            np.divide(self.opened + smoothing, images, out=np.full(self.opened.shape, 0.5), where=images > 0)
        )

    def firing_correlation(self) -> Doubles:
        """Phi coefficient of each pair of filters, in [-1, 1], `(filters, filters)`; 0 where one of them is constant.

        Raises:
            RequestError: pairs were not counted, or nothing was.
        """
        if self.together is None:
            raise RequestError("expected a census that counts pairs of filters, got one that does not")
        rates = self.rates()
        covariance = self.together / self._counted() - np.outer(rates, rates)
        deviation = np.sqrt(rates * (1 - rates))
        scale = np.outer(deviation, deviation)
        return np.asarray(np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0))

    def entropy(self) -> Doubles:
        """H(z_j), in [0, ln 2] nats, `(filters,)`."""
        return _binary_entropy(self.rates())

    def conditional_entropy(self) -> Doubles:
        """H(z_j | class), in [0, ln 2] nats, `(filters,)`."""
        shares = self.images / self._counted()
        return np.asarray(shares @ _binary_entropy(self.class_rates()))

    def information(self) -> Doubles:
        """Plug-in estimate of I(z_j; class) of each filter alone, in nats, `(filters,)`; too high by about `bias`."""
        return np.asarray(np.maximum(self.entropy() - self.conditional_entropy(), 0.0))

    def bias(self) -> Doubles:
        """By how much `information` is too high at first order, in nats, `(filters,)`.

        `(Σ_c (R_c - 1) - (R - 1)) / 2N` with R_c the states that occur within class c, and R those that occur at all
        (Panzeri and Treves, "Analytical estimates of limited sampling biases in different information measures", 1996).
        """

        def states(opened: Counts, images: Counts) -> Counts:
            return (opened > 0).astype(np.int64) + (opened < images).astype(np.int64)

        present = self.images > 0
        within = states(self.opened[present], self.images[present][:, None]) - 1
        overall = states(self.opened.sum(axis=0), self.images.sum()) - 1
        return np.asarray((within.sum(axis=0) - overall) / (2 * self._counted()), np.float64)

    def by_layer(self, values: Doubles) -> dict[str, Doubles]:
        """Values of all filters, `(..., filters)`, cut into those of each layer."""
        ends = np.cumsum(list(self.layers.values()))[:-1]
        return dict(zip(self.layers, np.split(values, ends, axis=-1), strict=True))

    def _counted(self) -> int:
        if not len(self):
            raise RequestError("expected a census of at least one image, got one of none")
        return len(self)


def _binary_entropy(rates: Doubles) -> Doubles:
    entropy = np.zeros_like(rates)
    for share in (rates, 1 - rates):
        entropy -= share * np.log(share, out=np.zeros_like(share), where=share > 0)
    return entropy
