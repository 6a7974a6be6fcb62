"""Many recipes over many images: what is missing in the store is crafted, what is there is left alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

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
from detector.workers import IN_PROCESS, Workers


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
    known: Mapping[str, object] | None = None,
    workers: Workers = IN_PROCESS,
) -> None:
    """Attack the images of `splits` that `network` gets right, shard by shard, into `store`.

    Each worker has only one shard in memory at a time, and what becomes of an image depends on the store's seed and on
    its own id alone: an interrupted run goes on where it stopped and gives the same files, and so do any number of
    workers.

    Args:
        network: the attacked network, decoupled but for experiments.
        splits: images by the name of their split.
        recipes: the attacks.
        store: opened for writing.
        listen: called at the start and after every shard.
        backbone: the plain network, for transfer attacks.
        watcher: the detector, for attacks that know it.
        known: what tells that detector, and what the attacker makes of it, from others, JSON values; noted with the
            parameters of these attacks.
        workers: who crafts; they write the shards, and this process alone says which are done.

    Raises:
        ArtifactError: the store holds attacks of the same name with other parameters.
        DataError: attacks whose length noise is to have are missing, the network gets no image right, or the disk is
            full.
    """
    size = store.origin.shard_images
    workers.check_folder(store.folder)
    right = {
        name: images.subset(rightly_classified(network, images, workers=workers)) for name, images in splits.items()
    }
    for name, images in right.items():
        if len(images) == 0:
            raise DataError(f"expected images that the network gets right in the split {name}, got none to attack")
    finished = store.records()
    for recipe in recipes:
        wanted = _parameters(recipe, known)
        # Stores of earlier versions do not tell the kind, the rate of false alarms, and some settings.
        earlier: dict[str, object] = {"kind": recipe.kind, **recipe.unwritten}
        earlier |= {name: wanted[name] for name in ("false_alarm_rate",) if name in wanted}
        stored = [{**earlier, **record.parameters} for key, record in finished.items() if key.recipe == recipe.name]
        other = [parameters for parameters in stored if parameters != wanted]
        if other:
            raise ArtifactError(
                f"expected attacks by {recipe.name} with {wanted}, got {store.folder} with "
                f"{other[0]}; give another folder"
            )
    attacked = {recipe.name for recipe in recipes} | {key.recipe for key in finished}
    for recipe in recipes:
        if recipe.matches is not None and recipe.matches not in attacked:
            raise DataError(
                f"expected attacks by {recipe.matches} in {store.folder} for noise as long, got none; give --recipes "
                f"{recipe.matches} first"
            )
    # Only what can be done is planned: `check_finished` asks for it.
    store.plan(
        {name: {recipe.name: len(images.first(recipe.images)) for recipe in recipes} for name, images in right.items()}
    )
    for name, images in right.items():
        keep_clean(store.folder, name, images)
    total = 0
    missing: list[_Task] = []
    for recipe in recipes:
        for name, every in right.items():
            images = every.first(recipe.images)
            for start in range(0, len(images), size):
                key, count = ShardKey(name, recipe.name, start // size), min(size, len(images) - start)
                total += 1
                # The last shard of an earlier run with fewer images may be shorter: that one is made anew.
                if key not in finished or finished[key].images < count:
                    missing.append(_Task(recipe, key, start, start + count))
    done = total - len(missing)
    listen(Campaign(done, total, None))
    crafting = _Crafting(network, backbone, watcher, known, right, store.folder)
    for tasks in _in_order(missing):
        for record in workers.map(crafting, tasks):
            store.note(record)
            done += 1
            listen(Campaign(done, total, record))


@dataclass(frozen=True, slots=True)
class _Task:
    """One shard to craft: images `start` to `end` of those of its split that the network gets right."""

    recipe: Recipe
    key: ShardKey
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Crafting:
    """What every worker holds; called, it gives what crafts and writes one shard."""

    network: nn.Module
    backbone: nn.Module | None
    watcher: Watcher | None
    known: Mapping[str, object] | None
    images: Mapping[str, ImageSet]
    folder: Path

    def __call__(self) -> Callable[[_Task], ShardRecord]:
        store = AttackStore(self.folder)
        device = device_of(self.network)

        def craft_shard(task: _Task) -> ShardRecord:
            recipe, key = task.recipe, task.key
            shard = self.images[key.split].subset(slice(task.start, task.end))
            pixels = to_tensor(shard.pixels(slice(None)), device)
            labels = torch.from_numpy(shard.labels).to(device)
            matched = None if recipe.matches is None else replace(key, recipe=recipe.matches)
            crafted = craft(
                recipe, self.network, pixels, labels, store.origin.seed, shard.ids, backbone=self.backbone,
                watcher=self.watcher, lengths=None if matched is None else _lengths(store, matched, shard.ids),
            )  # fmt: skip
            return store.write(key, shard.ids, shard.labels, crafted, _parameters(recipe, self.known))

        return craft_shard


def _in_order(tasks: Sequence[_Task]) -> Iterator[Sequence[_Task]]:
    """All tasks, cut where one takes over the lengths of another before it, which has to be done by then."""
    cuts, begun = [0], set[str]()
    for place, task in enumerate(tasks):
        if task.recipe.matches in begun:
            cuts.append(place)
            begun = set()
        begun.add(task.recipe.name)
    for start, end in pairwise([*cuts, len(tasks)]):
        yield tasks[start:end]


def _parameters(recipe: Recipe, known: Mapping[str, object] | None) -> dict[str, object]:
    """What is stored with the images: of an attack on a detector, which detector too."""
    return {**recipe.parameters, **(known or {})} if recipe.knows_detector else recipe.parameters


def _lengths(store: AttackStore, key: ShardKey, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """How long the stored changes of these images are, L2, `(images,)`."""
    shard = store.one(key)
    if shard is None or not np.array_equal(shard.ids[: len(ids)], ids):
        raise DataError(
            f"expected attacks by {key.recipe} on the same images of the split {key.split} in {store.folder} for noise "
            f"as long, got {'none' if shard is None else len(shard.ids)}; give --recipes {key.recipe} first"
        )
    return shard.crafted.l2[: len(ids)]
