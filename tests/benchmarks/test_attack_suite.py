from dataclasses import replace

import numpy as np
import pytest

from attacks.recipes import RECIPES
from attacks.suites import recipe_named
from benchmarks.attack_suite import SECONDS, run_suite, timed_shards
from detector.datasets import ImageSet
from detector.errors import DataError
from detector.images import ImageSpec
from tests.oracles import MeanBoundary

DIGEST = "a" * 64
MEMBERS = [replace(RECIPES["fgsm"], images=300), replace(RECIPES["pgd-1"], images=5), recipe_named("noise-pgd-1")]


@pytest.fixture
def images():
    pixels = np.full((520, 6, 6, 1), 122, np.uint8)
    return ImageSet(
        "grey", np.zeros(520, np.int64), np.arange(520), ("dark", "light"), ImageSpec(6, 6, 1), "grey",
        lambda ids: pixels[ids],
    )  # fmt: skip


def test_a_suite_is_run_whole_and_each_shard_is_timed(images, tmp_path):
    network = MeanBoundary(0.5)

    timed = timed_shards(network, network, DIGEST, images.first(300), MEMBERS[:2], tmp_path)

    assert [(shard.recipe, shard.images, shard.fooled) for shard in timed] == [
        ("fgsm", 250, 250), ("fgsm", 50, 50), ("pgd-1", 5, 0),
    ]  # fmt: skip
    assert all(shard.seconds > 0 and shard.busy > 0 for shard in timed)


def test_an_interrupted_run_goes_on_and_keeps_the_seconds_that_it_had(images, tmp_path):
    network = MeanBoundary(0.5)
    first = timed_shards(network, network, DIGEST, images.first(10), MEMBERS[:1], tmp_path)

    again = timed_shards(network, network, DIGEST, images.first(10), MEMBERS[:2], tmp_path)

    assert again[0] == first[0]
    assert [shard.recipe for shard in again] == ["fgsm", "pgd-1"]


def test_noise_takes_its_lengths_from_what_is_stored(images, tmp_path, capsys):
    network = MeanBoundary(0.5)

    by_clock, of_processor = run_suite("few", network, network, DIGEST, images.first(5), MEMBERS[1:], tmp_path)

    assert [(row.bar, row.met) for row in (by_clock, of_processor)] == [(60, True), (60, True)]
    assert "noise-pgd-1" in capsys.readouterr().out


def test_a_shard_without_its_seconds_is_refused(images, tmp_path):
    network = MeanBoundary(0.5)
    timed_shards(network, network, DIGEST, images.first(10), MEMBERS[:1], tmp_path)
    (tmp_path / SECONDS).write_text("")

    with pytest.raises(DataError, match="expected the seconds of every shard"):
        timed_shards(network, network, DIGEST, images.first(10), MEMBERS[:1], tmp_path)
