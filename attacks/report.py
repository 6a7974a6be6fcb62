"""How often each attack fooled the network, and by how much it changed the images."""

from dataclasses import dataclass

import numpy as np

from attacks.store import AttackStore


@dataclass(frozen=True, slots=True)
class AttackFigures:
    """One recipe on one split; norms are medians over the images that fooled the network, NaN where none did.

    Attributes:
        recipe: name of the attack.
        images: attacked images (the network was right on all of them).
        fooled: share of them that fooled the network after rounding to 8 bits, in [0, 1].
        linf: largest change of a pixel, in [0, 1].
        l2: Euclidean length of the change, pixels in [0, 1].
        l1: sum of the changes, pixels in [0, 1].
        l0: number of changed values.
    """

    recipe: str
    images: int
    fooled: float
    linf: float
    l2: float
    l1: float
    l0: float


def attack_figures(store: AttackStore, split: str) -> list[AttackFigures]:
    """One row per recipe that has finished shards on `split`; shards are read one by one."""
    rows = []
    for recipe in store.recipes(split):
        images = 0
        norms: dict[str, list[np.ndarray]] = {"linf": [], "l2": [], "l1": [], "l0": []}
        for shard in store.read(split, recipe):
            images += len(shard.ids)
            for norm, values in norms.items():
                values.append(getattr(shard.crafted, norm)[shard.crafted.fooled])
        joined = {norm: np.concatenate(values) for norm, values in norms.items()}
        medians = {norm: float(np.median(values)) if len(values) else float("nan") for norm, values in joined.items()}
        rows.append(AttackFigures(recipe, images, len(joined["l2"]) / images, **medians))
    return rows
