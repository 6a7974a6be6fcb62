"""What paths clean images of each class usually take: what an image's own path is compared with.

Kept with the bundle, small: counts of open filters for each class and a sample of whole paths.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from detector.errors import ArtifactError
from detector.interpretation.census import Census, Counts, Doubles
from detector.paths.path_encoding import Bits, PathEncoding

# Images added to each count of open and of closed filters: a state that was never seen is rare, not impossible.
SMOOTHING = 0.5


@dataclass(frozen=True, slots=True)
class NearPath:
    """A path of the sample, and how far it is.

    Attributes:
        image: index of its image in the training images of the data set.
        label: its class.
        distance: filters in another state.
    """

    image: int
    label: int
    distance: int


@dataclass(frozen=True, slots=True)
class UsualPaths:
    """Statistics of the paths of clean images that the network gets right.

    Attributes:
        census: counts of open filters, for each class.
        sample: whole paths, of each class about as many.
        ids: index of each of their images in its source, `int64`, `(sample,)`.
        labels: their classes, `int64`, `(sample,)`.
    """

    census: Census
    sample: PathEncoding
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    @property
    def rates(self) -> Doubles:
        """P(filter open | class), smoothed, in (0, 1), `(classes, filters)`."""
        return self.census.class_rates(SMOOTHING)

    def usual(self) -> Bits:
        """The state that each filter has for most images of each class, `(classes, filters)`."""
        return self.rates > 0.5

    def surprise(self, bits: Bits, labels: npt.NDArray[np.int64]) -> Doubles:
        """How unusual the state of each filter is for a class: -log P(state | class) in nats, `(images, filters)`.

        Args:
            bits: paths, `(images, filters)`.
            labels: the class that each is compared with, `(images,)`.
        """
        rates = self.rates[labels]
        return np.asarray(-np.log(np.where(bits, rates, 1 - rates)))

    def likelihoods(self, bits: Bits) -> Doubles:
        """log P(path | class) of independent filters, in nats, `(images, classes)`.

        Filters do depend on each other, so that differences between classes come out too large; their order stands.
        """
        log_open, log_closed = np.log(self.rates), np.log1p(-self.rates)
        return np.asarray(bits @ (log_open - log_closed).T + log_closed.sum(axis=1))

    def nearest(self, bits: Bits, label: int | None = None) -> NearPath | None:
        """The path of the sample that differs from `bits`, `(filters,)`, in the fewest filters.

        Args:
            bits: one path.
            label: look only among those of this class; None for all.
        """
        places = np.arange(len(self.sample)) if label is None else np.flatnonzero(self.labels == label)
        if not len(places):
            return None
        distances = np.count_nonzero(self.sample.bits[places] != bits, axis=1)
        best = int(distances.argmin())
        place = places[best]
        return NearPath(int(self.ids[place]), int(self.labels[place]), int(distances[best]))

    def to_bytes(self) -> bytes:
        """As one safetensors file."""
        arrays = {
            "images": self.census.images,
            "opened": self.census.opened,
            "sample": self.sample.packed(),
            "ids": self.ids,
            "labels": self.labels,
        }
        return safetensors.numpy.save({name: np.ascontiguousarray(values) for name, values in arrays.items()})

    @classmethod
    def from_bytes(cls, content: bytes, layers: Mapping[str, int], classes: int) -> "UsualPaths":
        """The inverse of `to_bytes`, for a network of these layers and classes.

        Raises:
            ArtifactError: it is damaged, or of another network.
        """
        try:
            arrays = safetensors.numpy.load(content)
            images: Counts = arrays["images"]
            opened: Counts = arrays["opened"]
            census = Census(layers, classes)
            if images.shape != census.images.shape or opened.shape != census.opened.shape:
                raise ArtifactError(f"expected counts of shape {census.opened.shape}, got {opened.shape}")
            census.images, census.opened = images.astype(np.int64), opened.astype(np.int64)
            sample = PathEncoding.unpacked(arrays["sample"], layers)
            return cls(census, sample, arrays["ids"], arrays["labels"])
        except (SafetensorError, KeyError) as error:
            raise ArtifactError(f"expected statistics of paths, got a damaged file ({error!r})") from None


class UsualPathsBuilder:
    """Makes `UsualPaths` of images that come batch by batch."""

    def __init__(self, layers: Mapping[str, int], classes: int, sample_of_each: int = 100) -> None:
        """Nothing seen yet.

        Args:
            layers: gate name -> its filters, in network order.
            classes: how many there are.
            sample_of_each: whole paths kept of each class: the first ones.
        """
        self.census = Census(layers, classes)
        self._room = np.full(classes, sample_of_each)
        self._bits: list[Bits] = []
        self._ids: list[npt.NDArray[np.int64]] = []
        self._labels: list[npt.NDArray[np.int64]] = []

    def add(self, path: PathEncoding, labels: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> None:
        """Take in paths of clean images that the network labels right.

        Args:
            path: their paths.
            labels: their classes, `int64`, `(images,)`.
            ids: index of each in its source, `int64`, `(images,)`.
        """
        self.census.add(path, labels)
        for label in np.flatnonzero(self._room):
            chosen = np.flatnonzero(labels == label)[: self._room[label]]
            self._room[label] -= len(chosen)
            self._bits.append(path.bits[chosen])
            self._ids.append(ids[chosen])
            self._labels.append(labels[chosen])

    def built(self) -> UsualPaths:
        """What was seen so far."""
        width = sum(self.census.layers.values())
        bits = np.concatenate([np.empty((0, width), np.bool_), *self._bits])
        none = np.empty(0, np.int64)
        ids, labels = np.concatenate([none, *self._ids]), np.concatenate([none, *self._labels])
        return UsualPaths(self.census, PathEncoding(bits, self.census.layers), ids, labels)
