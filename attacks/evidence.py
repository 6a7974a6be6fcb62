"""Attacked images in a store -> the paths that they took."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attacks.store import AttackStore, ShardRecord
from detector.batches import device_of, to_tensor
from detector.datasets import ImageSet
from detector.errors import DataError
from detector.network.decouple import GatedNet
from detector.paths.encoder import Evidence, encode, encode_set
from detector.scoring.sample import Sample
from detector.workers import IN_PROCESS, Workers


def fooling_evidence(
    network: GatedNet, store: AttackStore, split: str, recipe: str, workers: Workers = IN_PROCESS
) -> Iterator[Evidence]:
    """Evidence of the images of `recipe` on `split` that fooled the network, one shard in memory at a time."""
    for sample in _fooling(network, store, split, recipe, None, workers):
        yield sample.evidence


def fooling_sample(
    network: GatedNet, store: AttackStore, split: str, recipe: str, at_most: int, workers: Workers = IN_PROCESS
) -> Sample | None:
    """The images of `recipe` on `split` that fooled the network, the first `at_most` of them; None where none did."""
    parts = list(_fooling(network, store, split, recipe, at_most, workers))
    evidence = Evidence.stacked(part.evidence for part in parts)
    if evidence is None:
        return None
    return Sample(evidence, np.concatenate([part.ids for part in parts])).at(slice(at_most))


def clean_sample(network: GatedNet, images: ImageSet, at_most: int, workers: Workers = IN_PROCESS) -> Sample:
    """The first `at_most` images as they are.

    Raises:
        DataError: there are none.
    """
    first = images.first(at_most)
    evidence = Evidence.stacked(encode_set(network, first, workers=workers))
    if evidence is None:
        raise DataError(f"expected clean images in a split of {images.name}, got none")
    return Sample(evidence, first.ids)


def _fooling(
    network: GatedNet, store: AttackStore, split: str, recipe: str, at_most: int | None, workers: Workers
) -> Iterator[Sample]:
    """Those of each shard in which there are any, up to the shard that holds the last one wanted."""
    records = [r for k, r in store.records().items() if (k.split, k.recipe) == (split, recipe) and r.fooled]
    records.sort(key=lambda record: record.key.index)
    if at_most is not None:
        before = np.cumsum([0, *(record.fooled for record in records)])
        records = [record for record, count in zip(records, before[:-1], strict=True) if count < at_most]
    return workers.map(_Reading(network, store.folder.resolve()), records)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What every worker holds; called, it gives what reads the images of a shard that fooled, and their evidence."""

    network: GatedNet
    folder: Path

    def __call__(self) -> Callable[[ShardRecord], Sample]:
        store = AttackStore(self.folder)
        self.network.eval()

        def read(record: ShardRecord) -> Sample:
            shard = store.shard(record)
            fooled = shard.crafted.fooled
            pixels = to_tensor(shard.crafted.pixels[fooled], device_of(self.network))
            return Sample(encode(self.network, pixels), shard.ids[fooled])

        return read
