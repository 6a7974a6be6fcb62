import math

import numpy as np
import pytest

from attacks import report
from attacks.clean import KEPT, keep_clean, read_clean
from attacks.craft import Crafted
from attacks.report import attack_figures, summarise
from attacks.store import AttackStore, Origin, ShardKey
from detector.datasets import ImageSet
from detector.errors import ArtifactError
from detector.images import ImageSpec

LINF = {"norm": "linf", "budget": 8 / 255}
SMALLEST = {"norm": "l2", "budget": None}
NOISE = {"norm": None, "budget": None}
NAMES = ("cat", "dog", "<b>frog & newt</b>")


def clean_images(count):
    chooser = np.random.default_rng(0)
    pixels = chooser.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    labels = np.arange(count) % 3
    return ImageSet("photos", labels, np.arange(count), NAMES, ImageSpec(6, 6, 3), "photos", lambda ids: pixels[ids])


def fill(folder, split="test", images=12, recipes=(("pgd", LINF), ("cw", SMALLEST)), shard=5):
    """A store whose every other image was fooled: image i of recipe r moved by i + 1 grey levels in one value."""
    clean = clean_images(images)
    with AttackStore.writing(folder, Origin("a" * 64, "photos", 0, shard)) as store:
        keep_clean(folder, split, clean)
        store.plan({split: {name: images for name, _ in recipes}})
        for name, parameters in recipes:
            for start in range(0, images, shard):
                part = clean.subset(slice(start, start + shard))
                key = ShardKey(split, name, start // shard)
                store.note(store.write(key, part.ids, part.labels, moved(part), parameters))
    return AttackStore(folder)


def moved(part):
    attacked = part.pixels(slice(None)).copy()
    attacked[:, 0, 0, 0] ^= 1
    distance = ((part.ids + 1) / 255).astype(np.float32)
    fooled = part.ids % 2 == 0
    predicted = np.where(fooled, (part.labels + 1) % 3, part.labels)
    count = np.ones(len(part), np.int64)
    return Crafted(
        pixels=attacked, predicted=predicted, fooled=fooled, reached=fooled & (part.ids > 0), targets=-count,
        linf=distance, l2=distance, l1=distance, l0=count.astype(np.float32), forwards=3 * count, gradients=2 * count,
        seeds=count, flagged=np.zeros(len(part), bool), scores=np.full(len(part), np.nan),
    )  # fmt: skip


def test_success_medians_and_cost_are_those_of_the_images(tmp_path):
    row, _ = attack_figures(fill(tmp_path), "test")

    assert (row.recipe, row.images, row.fooled, row.reached) == ("pgd", 12, 0.5, 5 / 12)
    assert row.l2 == pytest.approx(np.median([1, 3, 5, 7, 9, 11]) / 255, rel=1e-6)
    assert (row.l0, row.forwards, row.gradients) == (1, 3, 2)


def test_noise_is_measured_on_all_images_since_it_aims_at_nothing(tmp_path):
    summary = summarise(fill(tmp_path, recipes=(("noise", NOISE),)), "test")[0]

    assert summary.figures.l2 == pytest.approx(6.5 / 255, rel=1e-6)
    assert not summary.is_attack


def test_no_success_has_no_distance_and_an_empty_curve(tmp_path):
    store = fill(tmp_path, images=1)
    shard = next(store.read("test", "pgd"))
    shard.crafted.fooled[:] = False
    with AttackStore.writing(tmp_path, store.origin) as writing:
        key = ShardKey("test", "pgd", 0)
        writing.note(writing.write(key, shard.ids, shard.labels, shard.crafted, LINF))

    summary = summarise(AttackStore(tmp_path), "test")[0]

    assert summary.figures.fooled == 0
    assert math.isnan(summary.figures.l2)
    assert len(summary.curve.shares) == 0


def test_a_curve_rises_to_the_success_rate_with_a_step_at_each_distance(tmp_path, monkeypatch):
    store = fill(tmp_path)
    curve = summarise(store, "test")[1].curve

    assert curve.norm == "l2"
    assert (curve.distances * 255).round(4).tolist() == [1, 3, 5, 7, 9, 11]
    assert (curve.shares * 12).round(6).tolist() == [1, 2, 3, 4, 5, 6]

    monkeypatch.setattr(report, "CURVE_POINTS", 3)
    thinned = summarise(store, "test")[1].curve
    assert (thinned.shares * 12).round(6).tolist() == [1, 3, 6]


def test_examples_are_images_beside_their_clean_twins_those_that_fooled_first(tmp_path):
    examples = summarise(fill(tmp_path), "test")[0].examples

    assert [example.image for example in examples] == [0, 2, 4, 6]
    assert np.array_equal(examples[1].clean, clean_images(12).pixels(np.array([2]))[0])
    assert np.abs(examples[1].clean.astype(int) - examples[1].attacked).sum() == 1
    assert (examples[1].label, examples[1].predicted, examples[1].fooled) == (NAMES[2], "cat", True)


def test_a_store_without_clean_twins_has_figures_but_no_examples(tmp_path):
    store = fill(tmp_path)
    (tmp_path / "test" / "clean.safetensors").unlink()

    summary = summarise(store, "test")[0]

    assert summary.figures.images == 12
    assert summary.examples == []


def test_clean_twins_are_the_first_images_and_are_kept_anew_where_the_images_are_others(tmp_path):
    keep_clean(tmp_path, "test", clean_images(3))
    keep_clean(tmp_path, "test", clean_images(40))

    kept = read_clean(tmp_path, "test")

    assert kept.ids.tolist() == list(range(KEPT))
    assert kept.class_names == NAMES
    assert np.array_equal(kept.pixels, clean_images(40).pixels(slice(0, KEPT)))
    assert read_clean(tmp_path, "fitting") is None


def test_damaged_clean_twins_are_told_in_one_line(tmp_path):
    keep_clean(tmp_path, "test", clean_images(3))
    (tmp_path / "test" / "clean.safetensors").write_bytes(b"damage")

    with pytest.raises(ArtifactError, match="expected clean images in .*clean.safetensors, got damaged content"):
        read_clean(tmp_path, "test")


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path, monkeypatch):
    store = fill(tmp_path, images=200, shard=5)
    alive = peak = 0
    read = AttackStore.read

    class Counted:
        def __init__(self, shard):
            nonlocal alive, peak
            alive += 1
            peak = max(peak, alive)
            self.ids, self.labels, self.crafted = shard.ids, shard.labels, shard.crafted

        def __del__(self):
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(AttackStore, "read", lambda *args: (Counted(shard) for shard in read(*args)))

    summaries = summarise(store, "test")

    assert peak <= 2
    assert alive == 0
    assert all(example.attacked.base is None for summary in summaries for example in summary.examples)
