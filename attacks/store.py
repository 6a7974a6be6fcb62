"""Attacked images on disk: shards of safetensors, and a manifest that alone says which of them are done.

safetensors because one shard is one flat file of named arrays that can be read without running code, checked by its
header, and mapped without copying; a shard of 250 images needs neither columns nor compression.

    DIR/manifest.json    whose network, which data set, which seed: written once
    DIR/plan.json        how many images each recipe is to attack on each split
    DIR/shards.jsonl     one line per finished shard, appended after the shard itself is safe on disk
    DIR/SPLIT/RECIPE/00000-250.safetensors ...    shard and number of images
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from attacks.craft import Crafted
from detector.errors import ArtifactError, DataError
from detector.files import sha256_of, write_whole
from detector.shard_log import ShardLog, check_origin, read_origin, sole_writer, write_origin

SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Origin:
    """What all shards of a store have in common.

    Attributes:
        network: SHA-256 of the attacked network's weights.
        data: name of the data set.
        seed: of the attacks' random draws.
        shard_images: images in a shard (fewer in the last one).
        schema: version of the store's layout.
    """

    network: str
    data: str
    seed: int
    shard_images: int
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class ShardKey:
    """Which shard: images `index * shard_images` and on of a split, attacked by a recipe."""

    split: str
    recipe: str
    index: int

    def file(self, images: int) -> str:
        """Its path within the store; a shard that is made anew with more images is another file."""
        return f"{self.split}/{self.recipe}/{self.index:05d}-{images}.safetensors"


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One finished shard: a line of `shards.jsonl`.

    Attributes:
        key: which shard.
        images: images in it.
        fooled: how many of them fooled the network, after rounding to 8 bits.
        sha256: of the file.
        parameters: of the recipe: its norm, budget and settings.
    """

    key: ShardKey
    images: int
    fooled: int
    sha256: str
    parameters: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Shard:
    """Attacked images read back.

    Attributes:
        ids: index of each image in its source, `int64`, `(images,)`.
        labels: right labels, `int64`, `(images,)`.
        crafted: the attacked images and what became of them.
    """

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    crafted: Crafted


class AttackStore:
    """A folder of attacked images; one writer at a time, any number of readers."""

    def __init__(self, folder: Path) -> None:
        """Open an existing store for reading.

        Raises:
            DataError: there is no store in `folder`.
            ArtifactError: its manifest is damaged or of another schema.
        """
        self.origin = read_origin(folder, Origin, SCHEMA, "attacked images", "pathguard attack")
        self.folder = folder
        self._log = ShardLog(folder / "shards.jsonl")

    @classmethod
    @contextmanager
    def writing(cls, folder: Path, origin: Origin) -> Iterator["AttackStore"]:
        """Open or begin a store for writing, alone.

        Raises:
            ArtifactError: the store belongs to another network, data set or seed.
            DataError: another process writes to it, or the folder cannot be written.
        """
        with sole_writer(folder):
            write_origin(folder, asdict(origin))
            store = cls(folder)
            check_origin(folder, asdict(store.origin), asdict(origin), "attacks")
            store._log.drop_torn_line()
            yield store

    def records(self) -> dict[ShardKey, ShardRecord]:
        """The finished shards, in the order in which they were finished."""
        found: dict[ShardKey, ShardRecord] = {}
        for entry in self._log.entries():
            try:
                record = ShardRecord(**{**entry, "key": ShardKey(**entry["key"])})
            except (TypeError, KeyError) as error:
                raise self._log.damaged(error) from None
            found[record.key] = record
        return found

    def counts(self, split: str) -> tuple[Counter[str], Counter[str]]:
        """How many images of the split each recipe was given, and with how many it fooled the network."""
        given, fooled = Counter[str](), Counter[str]()
        for key, record in self.records().items():
            if key.split == split:
                given[key.recipe] += record.images
                fooled[key.recipe] += record.fooled
        return given, fooled

    def plan(self, images: Mapping[str, Mapping[str, int]]) -> None:
        """Note how many images are to be attacked, split -> recipe -> images, beside what was planned before.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        planned = self._planned()
        for split, recipes in images.items():
            planned[split] = {**planned.get(split, {}), **recipes}
        _write(self.folder / "plan.json", planned)

    def check_finished(self, split: str) -> None:
        """Refuse a store whose attacks on `split` were interrupted.

        Raises:
            DataError: images that were planned are missing.
        """
        done: Counter[str] = Counter()
        for key, record in self.records().items():
            if key.split == split:
                done[key.recipe] += record.images
        for recipe, images in self._planned().get(split, {}).items():
            if done[recipe] < images:
                raise DataError(
                    f"expected {images} images attacked by {recipe} on the split {split}, got {done[recipe]} in "
                    f"{self.folder}; run `pathguard attack` again to finish"
                )

    def _planned(self) -> dict[str, dict[str, int]]:
        path = self.folder / "plan.json"
        try:
            planned: dict[str, dict[str, int]] = json.loads(path.read_bytes()) if path.exists() else {}
        except ValueError as error:
            raise ArtifactError(f"expected a plan of attacks in {path}, got {error}") from None
        return planned

    def write(
        self, key: ShardKey, ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], crafted: Crafted,
        parameters: Mapping[str, object],
    ) -> ShardRecord:  # fmt: skip
        """Write one shard, which is not done before it is noted; for any worker of the store's writer.

        Raises:
            DataError: the disk is full or cannot be written; the shards finished before stay usable.
        """
        arrays = {"ids": ids, "labels": labels, **{name: getattr(crafted, name) for name in Crafted.__slots__}}
        try:
            content = save({name: np.ascontiguousarray(values) for name, values in arrays.items()})
            digest = write_whole(self.folder / key.file(len(ids)), content)
        except OSError as error:
            raise self._no_room(key, len(ids), error) from None
        return ShardRecord(key, len(ids), int(crafted.fooled.sum()), digest, parameters)

    def note(self, record: ShardRecord) -> None:
        """Say in the manifest that a shard, which is safe on disk, is done; for the store's writer alone.

        Raises:
            DataError: the disk is full or cannot be written; the shards finished before stay usable.
        """
        try:
            self._log.append(asdict(record))
        except OSError as error:
            raise self._no_room(record.key, record.images, error) from None

    def _no_room(self, key: ShardKey, images: int, error: OSError) -> DataError:
        return DataError(
            f"expected room for {key.file(images)} in {self.folder}, got: {error.strerror}; the "
            f"{len(self.records())} finished shards are whole, and the same command goes on from there"
        )

    def read(self, split: str, recipe: str) -> Iterator[Shard]:
        """The finished shards of one recipe on one split, one in memory at a time, in order.

        Raises:
            ArtifactError: a shard is missing or altered.
        """
        records = [r for k, r in self.records().items() if (k.split, k.recipe) == (split, recipe)]
        for record in sorted(records, key=lambda record: record.key.index):
            yield self.shard(record)

    def one(self, key: ShardKey) -> Shard | None:
        """One finished shard; None where there is none.

        Raises:
            ArtifactError: it is missing or altered.
        """
        record = self.records().get(key)
        return None if record is None else self.shard(record)

    def shard(self, record: ShardRecord) -> Shard:
        """The finished shard of one of `records`.

        Raises:
            ArtifactError: it is missing or altered.
        """
        path = self.folder / record.key.file(record.images)
        if not path.is_file():
            raise ArtifactError(f"expected the shard {path} that the manifest names, got no file")
        if sha256_of(path) != record.sha256:
            raise ArtifactError(f"expected {path} as the manifest describes it, got altered content (SHA-256)")
        arrays = load_file(path)
        return Shard(arrays.pop("ids"), arrays.pop("labels"), Crafted(**arrays))

    def attacks(self, split: str) -> list[str]:
        """Those of `recipes` that aim at fooling: noise and corruptions left out."""
        aiming = {key.recipe for key, record in self.records().items() if record.parameters.get("norm") is not None}
        return [recipe for recipe in self.recipes(split) if recipe in aiming]

    def recipes(self, split: str) -> list[str]:
        """The recipes with finished shards on `split`, in the order in which they were begun."""
        return list(dict.fromkeys(key.recipe for key in self.records() if key.split == split))


def _write(path: Path, content: object) -> None:
    try:
        write_whole(path, json.dumps(content, indent=2).encode())
    except OSError as error:
        raise DataError(f"expected to write {path}, got: {error.strerror}") from None
