from dataclasses import replace

import numpy as np
import pytest
import torch

from attacks.corruptions import CORRUPTIONS
from attacks.craft import craft
from attacks.negatives import CORRUPTED, noise_like
from attacks.recipes import RECIPES
from attacks.stages import make_attacks
from attacks.store import AttackStore
from attacks.suites import recipes_named
from detector.batches import to_pixels
from detector.errors import ArtifactError, DataError, RequestError
from detector.network.networks import build_network

PGD = replace(RECIPES["pgd"], settings={**RECIPES["pgd"].settings, "steps": 2})


def ignore(_campaign):
    return None


def test_there_is_a_recipe_for_each_corruption_and_severity():
    assert len(CORRUPTED) == 75
    assert [recipe.name for recipe in CORRUPTED][:6] == [
        *(f"gaussian_noise-{severity}" for severity in range(1, 6)), "shot_noise-1",
    ]  # fmt: skip
    assert not any(recipe.is_attack for recipe in CORRUPTED)
    assert CORRUPTED[12].parameters["corruption"] == "impulse_noise"
    assert CORRUPTED[12].parameters["severity"] == 3


@pytest.mark.parametrize("recipe", CORRUPTED[4::5], ids=lambda recipe: recipe.name)
def test_a_corruption_is_crafted_with_each_images_own_seed(recipe):
    network, images = build_network("resnet8", 3, 10).eval(), (torch.rand(3, 3, 16, 16) * 255).round() / 255
    labels, ids = network(images).argmax(dim=1), np.array([5, 6, 7])

    together = craft(recipe, network, images, labels, 2, ids)
    alone = craft(recipe, network, images[1:2], labels[1:2], 2, ids[1:2])

    expected = CORRUPTIONS[str(recipe.settings["corruption"])](to_pixels(images), 5, together.seeds)
    assert np.array_equal(together.pixels, expected)
    assert np.array_equal(together.pixels[1:2], alone.pixels)
    assert not together.forwards.any()


def test_an_unknown_corruption_is_refused():
    rust = replace(CORRUPTED[0], settings={"corruption": "rust", "severity": 1})

    with pytest.raises(RequestError, match="expected a corruption of gaussian_noise, .*; got 'rust'"):
        rust.attack()


def test_noise_in_the_store_is_as_long_as_the_attack_it_matches(decoupled_bundle, digits, tmp_path):
    make_attacks(decoupled_bundle, digits, [PGD, noise_like(PGD)], tmp_path / "store", 60, 0, 8, ignore)

    store = AttackStore(tmp_path / "store")
    for attacked, noise in zip(store.read("test", "pgd"), store.read("test", "noise-pgd"), strict=True):
        assert np.array_equal(attacked.ids, noise.ids)
        assert np.allclose(noise.crafted.l2, attacked.crafted.l2, rtol=0.03)
        assert not np.array_equal(attacked.crafted.pixels, noise.crafted.pixels)


def test_noise_of_an_earlier_version_is_not_mixed_with_todays(decoupled_bundle, digits, tmp_path):
    make_attacks(decoupled_bundle, digits, [PGD, noise_like(PGD)], tmp_path / "store", 30, 0, 8, ignore)
    log = tmp_path / "store" / "shards.jsonl"
    log.write_text(log.read_text().replace(', "draws": "of its own"', ""))

    with pytest.raises(ArtifactError, match="attacks by noise-pgd with .*'draws': 'of its own'.* give another folder"):
        make_attacks(decoupled_bundle, digits, [PGD, noise_like(PGD)], tmp_path / "store", 60, 0, 8, ignore)
    AttackStore(tmp_path / "store").check_finished("test")


@pytest.mark.parametrize(("name", "images"), [("autoattack", 200), ("adaptive-hopskipjump", 50), ("pgd", None)])
def test_noise_runs_on_as_many_images_as_the_attack_it_matches(name, images):
    (noise,) = recipes_named(f"noise-{name}")

    assert (noise.matches, noise.images) == (name, images)
    assert not noise.is_attack
    assert not noise.knows_detector


def test_noise_without_the_attack_it_matches_is_refused(decoupled_bundle, digits, tmp_path):
    with pytest.raises(DataError, match="expected attacks by pgd in .* for noise as long.* give --recipes pgd first"):
        make_attacks(decoupled_bundle, digits, [noise_like(PGD)], tmp_path / "store", 60, 0, 8, ignore)

    AttackStore(tmp_path / "store").check_finished("test")  # what was refused is not waited for


def test_noise_without_lengths_and_noise_like_noise_are_refused():
    network, images = build_network("resnet8", 1, 10).eval(), torch.rand(2, 1, 8, 8)

    with pytest.raises(RequestError, match="expected lengths to match noise to, got none"):
        craft(noise_like(PGD), network, images, network(images).argmax(dim=1))
    with pytest.raises(RequestError, match="expected an attack for noise .*, got noise-pgd"):
        noise_like(noise_like(PGD))
