import gzip
import logging
import struct
import subprocess

import numpy as np
import pytest
from PIL import Image

from detector import datasets
from detector.datasets import load_splits
from detector.errors import DataError


def write_image(path, level=0, size=(6, 4), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level if mode == "L" else (level,) * 3).save(path)


@pytest.fixture
def photos(tmp_path):
    for index in range(30):
        write_image(tmp_path / "photos" / ("cat" if index % 2 else "dog") / f"{index}.png", index)
    return tmp_path / "photos"


def test_a_folder_of_class_folders_is_cut_by_source_image(photos):
    splits = load_splits(f"folder:{photos}")

    assert splits.train.class_names == ("cat", "dog")
    assert [len(splits.named(name)) for name in splits.__slots__] == [22, 3, 2, 1, 2, 5]
    parts = [splits.named(name) for name in ("fitting", "calibration", "test")]
    ids = np.concatenate([part.ids for part in parts])
    assert sorted(ids) == list(range(5))
    assert set(splits.train.ids).isdisjoint(splits.validation.ids)


def test_pixels_and_labels_of_a_folder_belong_together(photos):
    splits = load_splits(f"folder:{photos}")

    levels = splits.train.pixels(slice(None))[:, 0, 0, 0]

    assert np.array_equal(levels % 2 == 1, splits.train.labels == 0)
    assert splits.train.subset(slice(3, 5)).pixels(slice(None))[0, 0, 0, 0] == levels[3]


def test_the_cut_depends_on_file_names_and_not_on_the_order_of_the_folder(photos):
    before = load_splits(f"folder:{photos}").test.pixels(slice(None))
    (photos / "cat" / "1.png").touch()

    assert np.array_equal(load_splits(f"folder:{photos}").test.pixels(slice(None)), before)


def test_given_train_and_test_folders_are_respected(tmp_path):
    for part, count in (("train", 20), ("test", 10)):
        for index in range(count):
            write_image(tmp_path / part / f"class{index % 2}" / f"{index}.png", index, mode="RGB")

    splits = load_splits(f"folder:{tmp_path}")

    assert (len(splits.train), len(splits.validation), len(splits.held_out)) == (18, 2, 10)
    assert splits.train.spec.channels == 3


def test_images_of_two_sizes_are_refused_unless_a_size_is_given(photos):
    write_image(photos / "cat" / "large.png", 1, size=(9, 9))

    with pytest.raises(DataError, match="expected images of one size, got .* give --image-size to resize them"):
        load_splits(f"folder:{photos}")
    assert load_splits(f"folder:{photos}", image_size=8).train.pixels(slice(0, 2)).shape == (2, 8, 8, 1)


def test_grey_and_colour_are_not_mixed_in_silence(photos):
    write_image(photos / "cat" / "red.png", 1, mode="RGB")

    with pytest.raises(DataError, match="expected images all in colour or all grey, got .*red.png in colour"):
        load_splits(f"folder:{photos}")


def test_a_folder_with_other_files_has_another_digest(photos):
    before = load_splits(f"folder:{photos}").train.digest
    write_image(photos / "cat" / "new.png", 1)

    assert load_splits(f"folder:{photos}").train.digest != before


def test_a_damaged_image_in_a_folder_is_named(photos):
    (photos / "cat" / "broken.png").write_text("no image")

    with pytest.raises(DataError, match="expected an image file, got .*broken.png"):
        load_splits(f"folder:{photos}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "at least 2 class folders in .*, got 0"),
        (
            lambda root: [(root / name).mkdir() for name in ("cat", "dog")],
            "images .* in every class folder; none in cat, dog",
        ),
        (lambda root: (write_image(root / "cat" / "1.png"), (root / "dog").mkdir()), "none in dog"),
    ],
)
def test_an_empty_folder_and_empty_classes_are_refused(tmp_path, make, message):
    make(tmp_path)

    with pytest.raises(DataError, match=message):
        load_splits(f"folder:{tmp_path}")


def test_a_missing_folder_and_an_unknown_set_are_refused_with_what_is_known(tmp_path):
    with pytest.raises(DataError, match="got no folder .*/nowhere"):
        load_splits(f"folder:{tmp_path}/nowhere")
    with pytest.raises(DataError, match="expected a data set of fashion-mnist, cifar10 or folder:PATH; got 'mnist'"):
        load_splits("mnist")


def test_an_unknown_split_is_refused_with_the_known_ones(photos):
    with pytest.raises(DataError, match="expected a split of train, .*; got 'all'"):
        load_splits(f"folder:{photos}").named("all")


def test_a_given_folder_without_the_set_is_refused_without_any_download(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_download_with_torchvision", pytest.fail)

    with pytest.raises(DataError, match="expected cifar10 in .*: no file cifar-10-batches-py/data_batch_1"):
        load_splits("cifar10", tmp_path)


def small_fashion(raw, monkeypatch):
    """Four files in Fashion-MNIST's format with few images, and their checksums in place of the real ones."""
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + bytes(count * 784))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(count))
    sums = {file: datasets.sha256_of(raw / file) for file in datasets.FASHION_SHA256}
    monkeypatch.setattr(datasets, "FASHION_SHA256", sums)


def test_fashion_mnist_is_read_from_a_given_folder_and_an_altered_file_is_refused(tmp_path, monkeypatch):
    raw = tmp_path / "FashionMNIST" / "raw"
    small_fashion(raw, monkeypatch)

    splits = load_splits("fashion-mnist", tmp_path)
    with (raw / "train-images-idx3-ubyte").open("r+b") as opened:
        opened.seek(500)
        opened.write(b"x")

    assert splits.train.pixels(slice(0, 2)).shape == (2, 28, 28, 1)
    with pytest.raises(DataError, match="train-images-idx3-ubyte has SHA-256"):
        load_splits("fashion-mnist", tmp_path)


def test_sources_are_tried_in_order_and_each_step_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packed = tmp_path / "debian"
    small_fashion(packed, monkeypatch)

    def no_network(dataset, root):
        raise OSError("no route")

    def run(command, folder):
        """apt-get and dpkg, played: the first download finds no package lists."""
        if command[:2] == ["apt-get", "download"]:
            raise subprocess.CalledProcessError(100, command, stderr=b"E: no lists\n")
        if command[-2] == "download":
            (folder / "dataset-fashion-mnist_1_all.deb").touch()
        if command[0] == "dpkg":
            target = folder / "unpacked/usr/share/datasets/fashion-mnist"
            target.mkdir(parents=True)
            for file in datasets.FASHION_SHA256:
                (target / f"{file}.gz").write_bytes(gzip.compress((packed / file).read_bytes()))

    monkeypatch.setattr(datasets, "_download_with_torchvision", no_network)
    monkeypatch.setattr(datasets, "_run", run)
    monkeypatch.setattr(datasets.shutil, "which", lambda program: program)
    with caplog.at_level(logging.INFO):
        splits = load_splits("fashion-mnist")

    assert len(splits.held_out) == 10
    steps = [message.split(":", 1)[1] for message in caplog.messages]
    assert ["cache" in steps[0], "torchvision" in steps[1], "no route" in steps[2], "Debian" in steps[3]] == [True] * 4
    assert (tmp_path / "pathguard/FashionMNIST/raw/t10k-labels-idx1-ubyte").exists()


def test_when_no_source_has_the_set_the_error_names_all_that_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def no_network(dataset, root):
        raise OSError("no route")

    monkeypatch.setattr(datasets, "_download_with_torchvision", no_network)
    with pytest.raises(DataError, match=r"tried torchvision's downloader \(no route\); give --data-dir instead"):
        load_splits("cifar10")
