"""Path encodings on disk: shards of safetensors, and a log that alone says which of them are done.

DIR/manifest.json    whose network, which images, which gates: written once
DIR/shards.jsonl     one line per finished shard, appended after the shard itself is safe on disk
DIR/00000-1000.safetensors ...    shard and number of images: ids, labels, predicted, paths (packed bits)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from detector.bundle import Bundle
from detector.datasets import ImageSet
from detector.errors import ArtifactError, DataError
from detector.files import sha256_of, write_whole
from detector.network.decouple import GatedNet
from detector.paths.encoder import Evidence, encode_set
from detector.paths.path_encoding import PathEncoding
from detector.shard_log import ShardLog, check_origin, read_origin, sole_writer, write_origin
from detector.stages import check_fits
from detector.workers import IN_PROCESS, Workers

SCHEMA = 1

# Images in one forward pass: the memory of more would go back to the system each time (see `detector.memory`).
_AT_ONCE = 250


@dataclass(frozen=True, slots=True)
class EncodingOrigin:
    """What all shards of a folder of encodings have in common.

    Attributes:
        network: SHA-256 of the network's weights.
        data: name of the data set.
        digest: tells its images from others.
        split: name of the split.
        layers: gate name -> its channels, in network order.
        shard_images: images in a shard (fewer in the last one).
        schema: version of the folder's layout.
    """

    network: str
    data: str
    digest: str
    split: str
    layers: Mapping[str, int]
    shard_images: int
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class EncodingRecord:
    """One finished shard: a line of `shards.jsonl`.

    Attributes:
        index: images `index * shard_images` and on.
        images: images in it.
        sha256: of the file.
    """

    index: int
    images: int
    sha256: str

    @property
    def file(self) -> str:
        """Its name; a shard that is made anew with more images is another file."""
        return _file(self.index, self.images)


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """Encodings read back.

    Attributes:
        ids: index of each image in its source, `int64`, `(images,)`.
        labels: right labels, `int64`, `(images,)`.
        predicted: the network's labels, `int64`, `(images,)`.
        paths: the calculation paths.
    """

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    paths: PathEncoding


class Encodings:
    """A folder of encodings, for reading."""

    def __init__(self, folder: Path) -> None:
        """Open an existing folder.

        Raises:
            DataError: there are no encodings in `folder`.
            ArtifactError: its manifest is damaged or of another schema.
        """
        self.origin = read_origin(folder, EncodingOrigin, SCHEMA, "path encodings", "pathguard encode")
        self.folder = folder
        self.log = ShardLog(folder / "shards.jsonl")

    def records(self) -> dict[int, EncodingRecord]:
        """The finished shards by their index; of one that was made anew, the newest."""
        found: dict[int, EncodingRecord] = {}
        for entry in self.log.entries():
            try:
                record = EncodingRecord(**entry)
            except TypeError as error:
                raise self.log.damaged(error) from None
            found[record.index] = record
        return found

    def read(self) -> Iterator[EncodedShard]:
        """The finished shards, one in memory at a time, in order.

        Raises:
            ArtifactError: a shard is missing or altered.
        """
        for _, record in sorted(self.records().items()):
            path = self.folder / record.file
            if not path.is_file():
                raise ArtifactError(f"expected the shard {path} that the log names, got no file")
            if sha256_of(path) != record.sha256:
                raise ArtifactError(f"expected {path} as the log describes it, got altered content (SHA-256)")
            arrays = load_file(path)
            paths = PathEncoding.unpacked(arrays.pop("paths"), self.origin.layers)
            yield EncodedShard(arrays["ids"], arrays["labels"], arrays["predicted"], paths)


@dataclass(frozen=True, slots=True)
class EncodingFigures:
    """What was encoded.

    Attributes:
        images: how many.
        accuracy: share of them whose label the network gets right, in [0, 1].
        filters: channels of all gates together.
        open: mean share of them that is open, in [0, 1].
    """

    images: int
    accuracy: float
    filters: int
    open: float


def make_encodings(
    bundle: Bundle, images: ImageSet, split: str, folder: Path, shard_images: int,
    listen: Callable[[int, int], None], workers: Workers = IN_PROCESS,
) -> EncodingFigures:  # fmt: skip
    """Write the path encodings of `images`; what `folder` already holds is not done again.

    Args:
        bundle: with a decoupled network.
        images: to be encoded.
        split: what they are called.
        folder: of the encodings.
        shard_images: images in memory at a time.
        listen: called at the start and after every shard, with the shards done and those in all.
        workers: who encodes; the files are the same for any.

    Raises:
        ArtifactError: `folder` holds encodings by another network or of other images.
        DataError: the data does not fit, there are no images, the folder is in use, or the disk is full.
    """
    check_fits(bundle, images, other_files=True)
    if len(images) == 0:
        raise DataError(f"expected images in the split {split} of {images.name}, got none to encode")
    network, folder = bundle.network().to(workers.device), folder.resolve()
    origin = EncodingOrigin(
        bundle.network_digest, images.name, images.digest, split, dict(network.layers), shard_images
    )
    with sole_writer(folder):
        write_origin(folder, asdict(origin))
        encodings = Encodings(folder)
        check_origin(folder, asdict(encodings.origin), asdict(origin), "encodings")
        encodings.log.drop_torn_line()
        workers.check_folder(folder)
        done = encodings.records()
        counts = {
            start // shard_images: min(shard_images, len(images) - start)
            for start in range(0, len(images), shard_images)
        }
        # The last shard of an earlier run with fewer images may be shorter: that one is made anew.
        missing = [index for index, count in counts.items() if index not in done or done[index].images < count]
        listen(len(counts) - len(missing), len(counts))
        encoding = _Encoding(network, images, shard_images, folder)
        for number, record in enumerate(workers.map(encoding, missing), start=1):
            try:
                encodings.log.append(asdict(record))
            except OSError as error:
                raise _no_room(folder, record.file, error) from None
            listen(len(counts) - len(missing) + number, len(counts))
    return _figures(encodings)


@dataclass(frozen=True, slots=True)
class _Encoding:
    """What every worker holds; called, it gives what encodes and writes one shard."""

    network: GatedNet
    images: ImageSet
    shard_images: int
    folder: Path

    def __call__(self) -> Callable[[int], EncodingRecord]:
        self.network.eval()

        def encode_shard(index: int) -> EncodingRecord:
            shard = self.images.subset(slice(index * self.shard_images, (index + 1) * self.shard_images))
            evidence = Evidence.stacked(encode_set(self.network, shard, _AT_ONCE))
            assert evidence is not None
            content = save(
                {
                    "ids": np.ascontiguousarray(shard.ids),
                    "labels": np.ascontiguousarray(shard.labels),
                    "predicted": evidence.class_logits.argmax(axis=1),
                    "paths": evidence.path.packed(),
                }
            )
            file = _file(index, len(shard))
            try:
                return EncodingRecord(index, len(shard), write_whole(self.folder / file, content))
            except OSError as error:
                raise _no_room(self.folder, file, error) from None

        return encode_shard


def _figures(encodings: Encodings) -> EncodingFigures:
    images = right = opened = 0
    for shard in encodings.read():
        images += len(shard.ids)
        right += int((shard.predicted == shard.labels).sum())
        opened += int(shard.paths.bits.sum())
    filters = sum(encodings.origin.layers.values())
    return EncodingFigures(images, right / images, filters, opened / images / filters)


def _file(index: int, images: int) -> str:
    return f"{index:05d}-{images}.safetensors"


def _no_room(folder: Path, file: str, error: OSError) -> DataError:
    return DataError(
        f"expected room for {file} in {folder}, got: {error.strerror}; the finished shards are whole, and the same "
        "command goes on from there"
    )
