from dataclasses import replace

import numpy as np
import pytest

from detector.errors import ArtifactError, DataError
from detector.paths.encoder import Evidence, encode_set
from detector.paths.encodings import Encodings, make_encodings


def encode(bundle, images, folder, shard_images=16, listen=lambda *_: None):
    return make_encodings(bundle, images, "test", folder, shard_images, listen)


def test_what_is_read_back_is_what_the_network_says(decoupled_bundle, digits, tmp_path):
    figures = encode(decoupled_bundle, digits.test, tmp_path)

    expected = Evidence.stacked(encode_set(decoupled_bundle.network().eval(), digits.test, 16))
    shards = list(Encodings(tmp_path).read())
    assert np.concatenate([shard.ids for shard in shards]).tolist() == digits.test.ids.tolist()
    assert np.array_equal(np.concatenate([shard.paths.bits for shard in shards]), expected.path.bits)
    predicted = np.concatenate([shard.predicted for shard in shards])
    assert predicted.tolist() == expected.class_logits.argmax(axis=1).tolist()
    assert figures.images == len(digits.test)
    assert figures.accuracy == (predicted == digits.test.labels).mean()
    assert figures.open == pytest.approx(expected.path.bits.mean())


def test_an_interrupted_run_goes_on_where_it_stopped(decoupled_bundle, digits, tmp_path):
    told = []

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(decoupled_bundle, digits.test, tmp_path, listen=stop)
    encode(decoupled_bundle, digits.test, tmp_path, listen=lambda done, total: told.append((done, total)))

    shards = -(-len(digits.test) // 16)
    assert told == [(done, shards) for done in range(2, shards + 1)]


def test_a_larger_limit_makes_the_short_last_shard_anew(decoupled_bundle, digits, tmp_path):
    encode(decoupled_bundle, digits.test.first(20), tmp_path)
    assert encode(decoupled_bundle, digits.test.first(40), tmp_path).images == 40

    assert [record.images for record in Encodings(tmp_path).records().values()] == [16, 16, 8]


def test_encodings_of_other_images_are_not_mixed(decoupled_bundle, digits, tmp_path):
    encode(decoupled_bundle, digits.test, tmp_path)

    with pytest.raises(ArtifactError, match="expected encodings of shard_images 8, got .* with shard_images 16"):
        encode(decoupled_bundle, digits.test, tmp_path, 8)


def test_a_changed_shard_is_not_read(decoupled_bundle, digits, tmp_path):
    encode(decoupled_bundle, digits.test, tmp_path)
    shard = tmp_path / "00001-16.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")

    with pytest.raises(ArtifactError, match="got altered content"):
        list(Encodings(tmp_path).read())


def test_a_folder_without_encodings_and_no_images_are_refused(decoupled_bundle, digits, tmp_path):
    with pytest.raises(DataError, match="expected path encodings in .*, got no manifest.json"):
        Encodings(tmp_path)
    none = replace(digits.test, labels=digits.test.labels[:0], ids=digits.test.ids[:0])
    with pytest.raises(DataError, match="got none to encode"):
        encode(decoupled_bundle, none, tmp_path / "none")
