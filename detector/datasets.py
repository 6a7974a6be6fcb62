"""Labelled images from named sets and from folders, and the one place that says who may see which image.

A set is looked for in this order, and each step is logged: the folder that the user names, the cache, torchvision's
downloader and, for Fashion-MNIST, Debian's package `dataset-fashion-mnist`.
"""

import gzip
import hashlib
import logging
import os
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from detector.errors import DataError, ImageError
from detector.files import sha256_of
from detector.images import CHANNEL_NAMES, COLOUR_MODES, FORMATS, OWN_FILE_PIXELS, ImageSpec, Pixels, decode
from detector.torchvision_ops import import_torchvision

log = logging.getLogger(__name__)

Indices = npt.NDArray[np.int64]
FOLDER_PREFIX = "folder:"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DOWNLOAD_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images with labels, read on demand.

    Attributes:
        name: what the user called it, for example `cifar10` or `folder:photos`.
        labels: class index of each image, `int64`, `(images,)`.
        ids: index of each image in its source, `int64`, `(images,)`; a subset keeps the ids of its source.
        class_names: the classes, in the order of their index.
        spec: size and channels of the images.
        digest: tells this set of images from others: splits are only the same for the same images.
        read: ids -> `uint8` pixels `(images, height, width, channels)`.
    """

    name: str
    labels: npt.NDArray[np.int64]
    ids: Indices
    class_names: tuple[str, ...]
    spec: ImageSpec
    digest: str
    read: Callable[[Indices], Pixels]

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, positions: Indices | slice) -> Pixels:
        """`uint8` pixels `(images, height, width, channels)` of the images at `positions`."""
        return self.read(self.ids[positions])

    def subset(self, positions: Indices | slice) -> "ImageSet":
        """The images at `positions`, with the ids they have here."""
        return replace(self, labels=self.labels[positions], ids=self.ids[positions])

    def first(self, count: int | None) -> "ImageSet":
        """The first `count` images (all where `count` is None)."""
        return self if count is None else self.subset(slice(0, count))


@dataclass(frozen=True, slots=True)
class Splits:
    """One data set, cut by source image.

    Attributes:
        train: trains the network (the first 90 % of the training images).
        validation: chooses (the last 10 %).
        fitting: fits the detector (40 % of the test images, by a hash of the index).
        calibration: sets its threshold (30 %).
        test: judges it (30 %); touched once per published table.
        held_out: all test images: the network's own accuracy is on these.
    """

    train: ImageSet
    validation: ImageSet
    fitting: ImageSet
    calibration: ImageSet
    test: ImageSet
    held_out: ImageSet

    def named(self, name: str) -> ImageSet:
        """The split of that name.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.__slots__:
            raise DataError(f"expected a split of {', '.join(self.__slots__)}; got {name!r}")
        split: ImageSet = getattr(self, name)
        return split


def load_splits(name: str, data_dir: Path | None = None, image_size: int | None = None) -> Splits:
    """A named set (`fashion-mnist`, `cifar10`) or `folder:PATH`, cut by source image.

    Args:
        name: `fashion-mnist`, `cifar10`, or `folder:PATH` with one folder of images per class.
        data_dir: where the files of a named set lie; None to look in the cache and then to download.
        image_size: height and width to which images of a folder are resized; None takes them as they are.

    Raises:
        DataError: the set is unknown, cannot be had, or is damaged or empty.
    """
    if name.startswith(FOLDER_PREFIX):
        training, testing = _from_folder(Path(name.removeprefix(FOLDER_PREFIX)), image_size)
    elif name in NAMED_SETS:
        training, testing = NAMED_SETS[name](data_dir)
    else:
        raise DataError(f"expected a data set of {', '.join(NAMED_SETS)} or folder:PATH; got {name!r}")
    return cut(training, testing)


def cut(training: ImageSet, testing: ImageSet) -> Splits:
    """The splits of a set: 9 : 1 of the training images in their order, 4 : 3 : 3 of the test images by hash."""
    chosen = len(training) * 9 // 10
    order = np.array(sorted(range(len(testing)), key=lambda i: _hash(str(testing.ids[i]))), dtype=np.int64)
    ends = [len(testing) * 4 // 10, len(testing) * 7 // 10]
    fitting, calibration, test = (testing.subset(part) for part in np.split(order, ends))
    return Splits(
        train=training.subset(slice(0, chosen)),
        validation=training.subset(slice(chosen, None)),
        fitting=fitting,
        calibration=calibration,
        test=test,
        held_out=testing,
    )


def cache_dir() -> Path:
    """Where downloaded data sets are kept: `$XDG_CACHE_HOME/pathguard`, by default `~/.cache/pathguard`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pathguard"


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _in_memory(name: str, pixels: Pixels, labels: npt.NDArray[np.int64], classes: tuple[str, ...]) -> ImageSet:
    _, height, width, channels = pixels.shape
    spec = ImageSpec(height, width, channels)
    return ImageSet(name, labels, np.arange(len(labels)), classes, spec, name, lambda ids: pixels[ids])


def _fashion_mnist(data_dir: Path | None) -> tuple[ImageSet, ImageSet]:
    root = _resolve(
        "fashion-mnist",
        data_dir,
        {
            "torchvision's downloader": lambda root: _download_with_torchvision("FashionMNIST", root),
            f"Debian's package {DEBIAN_PACKAGE}": _unpack_debian_package,
        },
        _check_fashion_mnist,
    )
    datasets = import_torchvision("datasets")
    sets = []
    for train in (True, False):
        source = datasets.FashionMNIST(str(root), train=train)
        pixels, labels = source.data.numpy()[..., None], source.targets.numpy().astype(np.int64)
        sets.append(_in_memory("fashion-mnist", pixels, labels, FASHION_CLASSES))
    return sets[0], sets[1]


def _cifar10(data_dir: Path | None) -> tuple[ImageSet, ImageSet]:
    root = _resolve(
        "cifar10",
        data_dir,
        {"torchvision's downloader": lambda root: _download_with_torchvision("CIFAR10", root)},
        _check_cifar10,
    )
    datasets = import_torchvision("datasets")
    sets = []
    for train in (True, False):
        source = datasets.CIFAR10(str(root), train=train)
        sets.append(_in_memory("cifar10", source.data, np.array(source.targets, np.int64), tuple(source.classes)))
    return sets[0], sets[1]


NAMED_SETS: Mapping[str, Callable[[Path | None], tuple[ImageSet, ImageSet]]] = {
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
}


def _resolve(
    name: str,
    data_dir: Path | None,
    sources: Mapping[str, Callable[[Path], None]],
    problem_with: Callable[[Path], str | None],
) -> Path:
    """The folder that holds the checked files of a set, fetched if need be."""
    if data_dir is not None:
        log.info("%s: looking in the given folder %s", name, data_dir)
        problem = problem_with(data_dir)
        if problem:
            raise DataError(f"expected {name} in {data_dir}: {problem}")
        return data_dir
    root = cache_dir()
    problem = problem_with(root)
    log.info("%s: looking in the cache %s: %s", name, root, problem or "found")
    if problem is None:
        return root
    tried = []
    for source, fetch in sources.items():
        log.info("%s: trying %s", name, source)
        try:
            root.mkdir(parents=True, exist_ok=True)
            fetch(root)
            problem = problem_with(root)
        except (OSError, RuntimeError, EOFError, HTTPException, subprocess.SubprocessError, DataError) as error:
            problem = _last_words(error)
        if problem is None:
            log.info("%s: got it from %s", name, source)
            return root
        log.info("%s: %s: %s", name, source, problem)
        tried.append(f"{source} ({problem})")
    raise DataError(f"expected {name} in {root} or from its sources; tried {'; '.join(tried)}; give --data-dir instead")


def _check_fashion_mnist(root: Path) -> str | None:
    raw = root / "FashionMNIST" / "raw"
    for file, expected in FASHION_SHA256.items():
        if not (raw / file).is_file():
            return f"no file FashionMNIST/raw/{file}"
        found = sha256_of(raw / file)
        if found != expected:
            return f"FashionMNIST/raw/{file} has SHA-256 {found[:12]}..., expected {expected[:12]}..."
    return None


def _check_cifar10(root: Path) -> str | None:
    source = import_torchvision("datasets").CIFAR10
    utils = import_torchvision("datasets.utils")
    for file, md5 in [*source.train_list, *source.test_list, [source.meta["filename"], source.meta["md5"]]]:
        path = root / source.base_folder / file
        if not path.is_file():
            return f"no file {source.base_folder}/{file}"
        if not utils.check_integrity(str(path), md5):
            return f"{source.base_folder}/{file} is not the published file (MD5 differs)"
    return None


def _download_with_torchvision(dataset: str, root: Path) -> None:
    with _socket_timeout(DOWNLOAD_TIMEOUT_SECONDS):
        getattr(import_torchvision("datasets"), dataset)(str(root), download=True)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _unpack_debian_package(root: Path) -> None:
    """Fetch the package with `apt-get download`, unpack it without root, and put its files where torchvision reads."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise DataError(f"expected the program {program} of Debian, got none")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            _run(["apt-get", "download", DEBIAN_PACKAGE], folder)
        except subprocess.CalledProcessError:  # no package lists on this machine: fetch them into a private folder
            lists = folder / "lists"
            (lists / "partial").mkdir(parents=True)
            (folder / "archives" / "partial").mkdir(parents=True)
            private = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={folder}"]
            _run(["apt-get", *private, "update"], folder)
            _run(["apt-get", *private, "download", DEBIAN_PACKAGE], folder)
        package = next(folder.glob(f"{DEBIAN_PACKAGE}_*.deb"), None)
        if package is None:
            raise DataError(f"expected {DEBIAN_PACKAGE}_*.deb from apt-get download, got no file")
        _run(["dpkg", "-x", str(package), str(folder / "unpacked")], folder)
        raw = root / "FashionMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for file in FASHION_SHA256:
            packed = folder / "unpacked/usr/share/datasets/fashion-mnist" / f"{file}.gz"
            partial = raw / f"{file}.partial"
            with gzip.open(packed) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
            partial.replace(raw / file)


def _last_words(error: Exception) -> str:
    """One line of an error; of a program that failed, the last line that it said."""
    said = error.stderr.decode(errors="replace").strip() if isinstance(error, subprocess.CalledProcessError) else ""
    return " ".join((said.splitlines()[-1] if said else str(error)).split())[:200] or type(error).__name__


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)


def _from_folder(root: Path, image_size: int | None) -> tuple[ImageSet, ImageSet]:
    """The images of `root/CLASS/*`, or of `root/train/CLASS/*` and `root/test/CLASS/*` where both exist."""
    if not root.is_dir():
        raise DataError(f"expected a folder with one folder of images per class, got no folder {root}")
    if (root / "train").is_dir() and (root / "test").is_dir():
        classes, training = _files_by_class(root / "train")
        test_classes, testing = _files_by_class(root / "test")
        if test_classes != classes:
            raise DataError(
                f"expected the classes {', '.join(classes)} in {root / 'test'}; got {', '.join(test_classes)}"
            )
    else:
        classes, files = _files_by_class(root)
        trained = len(files) * 5 // 6
        training, testing = files[:trained], files[trained:]
    spec = _spec_of([path for path, _ in (*training, *testing)], image_size)
    name, digest = f"{FOLDER_PREFIX}{root}", _digest_of(root, [path for path, _ in (*training, *testing)])
    return _of_files(name, training, classes, spec, digest), _of_files(name, testing, classes, spec, digest)


def _digest_of(root: Path, files: list[Path]) -> str:
    """Of the files' names below `root` and their sizes."""
    listing = sorted(f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in files)
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def _files_by_class(root: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names and (file, class index), in an order that depends on the files' names only."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    if len(folders) < 2:
        raise DataError(f"expected at least 2 class folders in {root}, got {len(folders)}")
    files = [
        (path, index)
        for index, folder in enumerate(folders)
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    counts = Counter(index for _, index in files)
    empty = [folder.name for index, folder in enumerate(folders) if counts[index] == 0]
    if empty:
        raise DataError(
            f"expected images ({', '.join(IMAGE_SUFFIXES)}) in every class folder; none in {', '.join(empty)}"
        )
    files.sort(key=lambda file: _hash(file[0].relative_to(root).as_posix()))
    return tuple(folder.name for folder in folders), files


def _spec_of(files: list[Path], image_size: int | None) -> ImageSpec:
    """The size and colour of all files, read from their headers."""
    sizes: dict[tuple[int, int], Path] = {}
    colours: dict[bool, Path] = {}
    for path in files:
        try:
            with Image.open(path, formats=FORMATS) as opened:
                sizes.setdefault((opened.height, opened.width), path)
                colours.setdefault(opened.mode in COLOUR_MODES, path)
        except (OSError, Image.DecompressionBombError) as error:
            raise DataError(f"expected an image file, got {path} ({' '.join(str(error).split())[:120]})") from None
    if len(colours) > 1:
        raise DataError(
            f"expected images all in colour or all grey, got {colours[True]} in colour and {colours[False]}"
        )
    channels = 3 if True in colours else 1
    if image_size is not None:
        return ImageSpec(image_size, image_size, channels, resize=True)
    if len(sizes) > 1:
        (first, one), (second, other) = list(sizes.items())[:2]
        raise DataError(
            f"expected images of one size, got {one} with {first[0]} x {first[1]} and {other} with "
            f"{second[0]} x {second[1]}; give --image-size to resize them"
        )
    height, width = next(iter(sizes))
    return ImageSpec(height, width, channels)


def _of_files(
    name: str, files: list[tuple[Path, int]], classes: tuple[str, ...], spec: ImageSpec, digest: str
) -> ImageSet:
    if not files:
        raise DataError(f"expected at least 6 images in {name}, got too few to set some aside for testing")
    paths = [path for path, _ in files]

    def read(ids: Indices) -> Pixels:
        pixels = np.empty((len(ids), spec.height, spec.width, spec.channels), np.uint8)
        for row, index in enumerate(ids):
            try:
                pixels[row] = decode(paths[index].read_bytes(), spec, OWN_FILE_PIXELS).pixels
            except (ImageError, OSError) as error:
                raise DataError(f"{paths[index]}: {error}") from None
        return pixels

    labels = np.array([label for _, label in files], np.int64)
    return ImageSet(name, labels, np.arange(len(files)), classes, spec, digest, read)


def describe(images: ImageSet) -> str:
    """One line for a person: how many images of which kind and how many classes."""
    kind = CHANNEL_NAMES[images.spec.channels]
    size = f"{images.spec.height} x {images.spec.width}"
    return f"{len(images)} {kind} images of {size} in {len(images.class_names)} classes ({images.name})"
