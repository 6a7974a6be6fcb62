"""Many recipes over many images: what is missing in the store is crafted, what is there is left alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from attacks.clean import keep_clean
from attacks.craft import craft
from attacks.problem import Watcher
from attacks.recipes import Recipe
from attacks.selection import rightly_classified
from attacks.store import AttackStore, ShardKey, ShardRecord
from detector.batches import device_of, to_tensor
from detector.datasets import ImageSet
from detector.errors import ArtifactError, DataError


@dataclass(frozen=True, slots=True)
class Campaign:
    """Where a run of attacks stands; given to a listener after every shard.

    Attributes:
        done: shards finished, those of earlier runs included.
        total: shards of the whole run.
        record: the shard just finished; None at the start.
    """

    done: int
    total: int
    record: ShardRecord | None


def run_attacks(
    network: nn.Module,
    splits: Mapping[str, ImageSet],
    recipes: Sequence[Recipe],
    store: AttackStore,
    listen: Callable[[Campaign], None],
    backbone: nn.Module | None = None,
    watcher: Watcher | None = None,
    detector: str | None = None,
) -> None:
    """Attack the images of `splits` that `network` gets right, shard by shard, into `store`.

    Only one shard is in memory at a time, and what becomes of an image depends on the store's seed and on its own id
    alone: an interrupted run goes on where it stopped and gives the same files.

    Args:
        network: the attacked network, decoupled but for experiments.
        splits: images by the name of their split.
        recipes: the attacks.
        store: opened for writing.
        listen: called at the start and after every shard.
        backbone: the plain network, for transfer attacks.
        watcher: the detector, for attacks that know it.
        detector: what tells that detector from others; noted with the parameters of these attacks.

    Raises:
        ArtifactError: the store holds attacks of the same name with other parameters.
        DataError: attacks whose length noise is to have are missing, the network gets no image right, or the disk is
            full.
    """
    size = store.origin.shard_images
    right = {name: images.subset(rightly_classified(network, images)) for name, images in splits.items()}
    for name, images in right.items():
        if len(images) == 0:
            raise DataError(f"expected images that the network gets right in the split {name}, got none to attack")
    store.plan(
        {name: {recipe.name: len(images.first(recipe.images)) for recipe in recipes} for name, images in right.items()}
    )
    for name, images in right.items():
        keep_clean(store.folder, name, images)
    finished = store.records()
    for recipe in recipes:
        wanted = _parameters(recipe, detector)
        other = [r for key, r in finished.items() if key.recipe == recipe.name and r.parameters != wanted]
        if other:
            raise ArtifactError(
                f"expected attacks by {recipe.name} with {wanted}, got {store.folder} with "
                f"{other[0].parameters}; give another folder"
            )
    total, missing = 0, []
    for recipe in recipes:
        for name, every in right.items():
            images = every.first(recipe.images)
            for start in range(0, len(images), size):
                key, shard = ShardKey(name, recipe.name, start // size), images.subset(slice(start, start + size))
                total += 1
                # The last shard of an earlier run with fewer images may be shorter: that one is made anew.
                if key not in finished or finished[key].images < len(shard):
                    missing.append((recipe, key, shard))
    done = total - len(missing)
    listen(Campaign(done, total, None))
    for recipe, key, shard in missing:
        pixels = to_tensor(shard.pixels(slice(None)), device_of(network))
        labels = torch.from_numpy(shard.labels).to(pixels.device)
        lengths = None if recipe.matches is None else _lengths(store, replace(key, recipe=recipe.matches), shard.ids)
        crafted = craft(
            recipe, network, pixels, labels, store.origin.seed, shard.ids, backbone=backbone, watcher=watcher,
            lengths=lengths,
        )  # fmt: skip
        record = store.add(key, shard.ids, shard.labels, crafted, _parameters(recipe, detector))
        done += 1
        listen(Campaign(done, total, record))


def _parameters(recipe: Recipe, detector: str | None) -> dict[str, object]:
    """What is stored with the images: of an attack on a detector, which detector too."""
    return {**recipe.parameters, "detector": detector} if recipe.knows_detector else recipe.parameters


def _lengths(store: AttackStore, key: ShardKey, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """How long the stored changes of these images are, L2, `(images,)`."""
    shard = store.one(key)
    if shard is None or not np.array_equal(shard.ids[: len(ids)], ids):
        raise DataError(
            f"expected attacks by {key.recipe} on the same images of the split {key.split} in {store.folder} for noise "
            f"as long, got {'none' if shard is None else len(shard.ids)}; give --recipes {key.recipe} first"
        )
    return shard.crafted.l2[: len(ids)]
