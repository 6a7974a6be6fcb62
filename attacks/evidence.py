"""Attacked images in a store -> the paths that they took."""

from attacks.store import AttackStore
from detector.batches import device_of, to_tensor
from detector.decouple import GatedNet
from detector.encoder import Evidence, encode


def fooling_evidence(network: GatedNet, store: AttackStore, split: str) -> dict[str, Evidence]:
    """Recipe -> evidence of its images on `split` that fooled the network; pixels are read shard by shard.

    A recipe that fooled the network on no image is left out.
    """
    network.eval()
    found = {}
    for recipe in store.recipes(split):
        parts = []
        for shard in store.read(split, recipe):
            pixels = shard.crafted.pixels[shard.crafted.fooled]
            if len(pixels):
                parts.append(encode(network, to_tensor(pixels, device_of(network))))
        if parts:
            found[recipe] = Evidence.stacked(parts)
    return found
