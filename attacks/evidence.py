"""Attacked images in a store -> the paths that they took."""

from collections.abc import Iterator

import numpy as np

from attacks.store import AttackStore
from detector.batches import device_of, to_tensor
from detector.datasets import ImageSet
from detector.errors import DataError
from detector.network.decouple import GatedNet
from detector.paths.encoder import Evidence, encode, encode_set
from detector.scoring.choice import Sample


def fooling_evidence(network: GatedNet, store: AttackStore, split: str, recipe: str) -> Iterator[Evidence]:
    """Evidence of the images of `recipe` on `split` that fooled the network, one shard in memory at a time."""
    for sample in _fooling(network, store, split, recipe):
        yield sample.evidence


def fooling_sample(network: GatedNet, store: AttackStore, split: str, recipe: str, at_most: int) -> Sample | None:
    """The images of `recipe` on `split` that fooled the network, the first `at_most` of them; None where none did."""
    parts: list[Sample] = []
    for part in _fooling(network, store, split, recipe):
        parts.append(part)
        if sum(len(found.ids) for found in parts) >= at_most:
            break
    evidence = Evidence.stacked(part.evidence for part in parts)
    if evidence is None:
        return None
    return Sample(evidence, np.concatenate([part.ids for part in parts])).at(slice(at_most))


def clean_sample(network: GatedNet, images: ImageSet, at_most: int) -> Sample:
    """The first `at_most` images as they are.

    Raises:
        DataError: there are none.
    """
    first = images.first(at_most)
    evidence = Evidence.stacked(encode_set(network, first))
    if evidence is None:
        raise DataError(f"expected clean images in a split of {images.name}, got none")
    return Sample(evidence, first.ids)


def _fooling(network: GatedNet, store: AttackStore, split: str, recipe: str) -> Iterator[Sample]:
    network.eval()
    for shard in store.read(split, recipe):
        pixels = shard.crafted.pixels[shard.crafted.fooled]
        if len(pixels):
            yield Sample(encode(network, to_tensor(pixels, device_of(network))), shard.ids[shard.crafted.fooled])
