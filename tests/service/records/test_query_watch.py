import numpy as np
import pytest
from sklearn.datasets import load_digits

from service.records.query_watch import QueryWatch, fingerprint


def photos():
    return np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None].repeat(4, axis=1).repeat(4, axis=2)


def watch(memory_images=200, max_clients=10, distance=3.0, neighbours=50):
    return QueryWatch(memory_images, max_clients, distance, neighbours)


def test_a_coarse_image_is_the_brightness_of_its_blocks():
    blocks = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    for scale in (1, 4, 28):
        image = blocks.repeat(scale, axis=0).repeat(scale, axis=1)[..., None].repeat(3, axis=2)
        assert fingerprint(image).tolist() == blocks.ravel().tolist()


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 4, 3), (5, 13, 3), (33, 7, 1), (224, 225, 3)])
def test_any_size_has_one(shape):
    assert fingerprint(np.full(shape, 77, dtype=np.uint8)).tolist() == [77] * 64


def test_many_small_changes_of_one_image_raise_the_alarm_once_per_series():
    random, base, watched = np.random.default_rng(0), photos()[0].astype(int), watch()
    seen = [
        watched.sees("attacker", np.clip(base + random.integers(-8, 9, base.shape), 0, 255).astype(np.uint8))
        for _ in range(102)
    ]
    assert [position for position, alarm in enumerate(seen) if alarm] == [50, 101]


def test_a_client_with_many_real_photos_raises_none():
    watched = watch(memory_images=500, neighbours=5)
    assert not any(watched.sees("shop", photo) for photo in photos())


def test_clients_are_told_apart():
    watched, photo = watch(neighbours=10), photos()[0]
    assert not any(watched.sees(f"client {turn % 3}", photo) for turn in range(30))
    assert watched.sees("client 0", photo)


def test_only_so_many_images_and_clients_are_remembered():
    watched, many = watch(memory_images=20, max_clients=3, neighbours=1), photos()
    watched.sees("a", many[0])
    for photo in many[1:22]:
        assert not watched.sees("a", photo)
    assert not watched.sees("a", many[0])
    for client in "bcd":
        watched.sees(client, many[0])
    assert len(watched) == 3
    assert not watched.sees("a", many[0])
