"""Attacked images in a store -> the paths that they took."""

from collections.abc import Iterator

from attacks.store import AttackStore
from detector.batches import device_of, to_tensor
from detector.network.decouple import GatedNet
from detector.paths.encoder import Evidence, encode


def fooling_evidence(network: GatedNet, store: AttackStore, split: str, recipe: str) -> Iterator[Evidence]:
    """Evidence of the images of `recipe` on `split` that fooled the network, one shard in memory at a time."""
    network.eval()
    for shard in store.read(split, recipe):
        pixels = shard.crafted.pixels[shard.crafted.fooled]
        if len(pixels):
            yield encode(network, to_tensor(pixels, device_of(network)))
