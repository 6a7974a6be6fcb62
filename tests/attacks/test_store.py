import json
from dataclasses import replace

import numpy as np
import pytest

from attacks import store as stores
from attacks.craft import Crafted
from attacks.store import AttackStore, Origin, ShardKey
from detector.errors import ArtifactError, DataError

ORIGIN = Origin("a" * 64, "digits", 0, 3)
PARAMETERS = {"norm": "linf", "budget": 0.03}


def crafted(count, seed=0):
    chooser = np.random.default_rng(seed)
    size = chooser.random(count).astype(np.float32)
    numbers, fooled = np.arange(count), np.arange(count) % 2 == 0
    return Crafted(
        chooser.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8), numbers, fooled, fooled, fooled,
        size.astype(float), numbers, size, size, size, size, numbers, numbers, numbers,
    )  # fmt: skip


def add(store, index, count=3):
    key = ShardKey("test", "fgsm", index)
    ids, labels = np.arange(count) + 3 * index, np.zeros(count, np.int64)
    store.note(store.write(key, ids, labels, crafted(count, index), PARAMETERS))


def test_shards_come_back_in_order_as_they_were_written(tmp_path):
    with AttackStore.writing(tmp_path, ORIGIN) as store:
        add(store, 1)
        add(store, 0)

    found = list(AttackStore(tmp_path).read("test", "fgsm"))

    assert [shard.ids.tolist() for shard in found] == [[0, 1, 2], [3, 4, 5]]
    assert np.array_equal(found[1].crafted.pixels, crafted(3, 1).pixels)
    assert found[0].crafted.fooled.tolist() == [True, False, True]
    record = AttackStore(tmp_path).records()[ShardKey("test", "fgsm", 0)]
    assert (record.images, record.fooled, record.parameters) == (3, 2, PARAMETERS)


def test_a_line_torn_by_an_interruption_counts_as_not_done_and_is_mended(tmp_path):
    with AttackStore.writing(tmp_path, ORIGIN) as store:
        add(store, 0)
        add(store, 1)
    log = tmp_path / "shards.jsonl"
    log.write_bytes(log.read_bytes()[:-20])

    assert list(AttackStore(tmp_path).records()) == [ShardKey("test", "fgsm", 0)]
    with AttackStore.writing(tmp_path, ORIGIN) as store:
        add(store, 1)

    assert len(AttackStore(tmp_path).records()) == 2
    assert all(json.loads(line) for line in log.read_text().splitlines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "b" * 64}, "expected attacks of network b"),
        ({"seed": 1}, "expected attacks of seed 1, got .* with seed 0"),
        ({"data": "cifar10"}, "expected attacks of data cifar10"),
    ],
)
def test_a_store_of_another_network_data_set_or_seed_is_refused(tmp_path, change, message):
    with AttackStore.writing(tmp_path, ORIGIN) as store:
        add(store, 0)

    with pytest.raises(ArtifactError, match=message), AttackStore.writing(tmp_path, replace(ORIGIN, **change)):
        pytest.fail("it was opened")


def test_two_writers_on_one_folder_are_refused(tmp_path):
    with (
        AttackStore.writing(tmp_path, ORIGIN),
        pytest.raises(DataError, match="expected to be the only writer"),
        AttackStore.writing(tmp_path, ORIGIN),
    ):
        pytest.fail("it was opened")


def test_an_altered_or_missing_shard_is_named(tmp_path):
    with AttackStore.writing(tmp_path, ORIGIN) as store:
        add(store, 0)
    path = tmp_path / "test/fgsm/00000-3.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(ArtifactError, match="got altered content"):
        list(AttackStore(tmp_path).read("test", "fgsm"))
    path.unlink()
    with pytest.raises(ArtifactError, match="that the manifest names, got no file"):
        list(AttackStore(tmp_path).read("test", "fgsm"))


def test_an_unfinished_run_is_told_from_a_finished_one(tmp_path):
    with AttackStore.writing(tmp_path, ORIGIN) as store:
        store.plan({"test": {"fgsm": 5}})
        add(store, 0)
        with pytest.raises(DataError, match="expected 5 images attacked by fgsm on the split test, got 3"):
            store.check_finished("test")
        add(store, 1, count=2)

    AttackStore(tmp_path).check_finished("test")


def test_a_damaged_line_is_told_in_one_line(tmp_path):
    with AttackStore.writing(tmp_path, ORIGIN) as store:
        add(store, 0)
    (tmp_path / "shards.jsonl").write_text('{"key": 3}\n')

    with pytest.raises(ArtifactError, match="expected a line for each finished shard"):
        AttackStore(tmp_path).records()


def test_a_full_disk_leaves_the_finished_shards_usable(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    with AttackStore.writing(tmp_path, ORIGIN) as store:
        add(store, 0)
        monkeypatch.setattr(stores, "write_whole", full)
        with pytest.raises(DataError, match="No space left on device; the 1 finished shards are whole"):
            add(store, 1)

    assert len(list(AttackStore(tmp_path).read("test", "fgsm"))) == 1


def test_a_folder_without_attacks_names_the_command_that_makes_them(tmp_path):
    with pytest.raises(DataError, match="got no manifest.json; `pathguard attack` makes them"):
        AttackStore(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="expected a manifest of attacked images"):
        AttackStore(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**vars_of(ORIGIN), "schema": 9}))
    with pytest.raises(ArtifactError, match="expected attacked images of schema 2, got schema 9"):
        AttackStore(tmp_path)


def vars_of(origin):
    return {name: getattr(origin, name) for name in origin.__slots__}
