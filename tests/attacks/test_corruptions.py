from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from attacks.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from detector.errors import RequestError

every_corruption = pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=lambda corruption: corruption.name)
# Their published constants trade one kind of change for another from step to step: glass_blur blurs more and shuffles
# once less, frost darkens the image that it covers, elastic_transform shifts less and stretches more.
NOT_BY_DISTANCE = ("glass_blur", "frost", "elastic_transform")
SEEDS = range(100, 116)


@pytest.fixture(scope="module")
def photos():
    """16 pieces of a photograph that scikit-learn ships, 32 x 32, coloured."""
    whole = load_sample_image("china.jpg")[:416:2, :640:2]
    tiles = [whole[y : y + 32, x : x + 32] for y in range(0, 128, 32) for x in range(0, 128, 32)]
    return np.stack(tiles)


def distance(one, other):
    return np.linalg.norm((one.astype(float) - other) / 255, axis=(1, 2)).mean()


def test_there_are_the_fifteen_of_cifar_10_c():
    assert len(CORRUPTIONS) == 15
    assert all(len(corruption.constants) == len(SEVERITIES) for corruption in CORRUPTIONS.values())


@every_corruption
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (8, 8, 1), (24, 40, 3)])
def test_gives_images_of_the_same_kind(corruption, severity, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    before = pixels.copy()

    damaged = corruption(pixels, severity, [3, 4])

    assert damaged.shape == pixels.shape
    assert damaged.dtype == np.uint8
    assert np.array_equal(pixels, before)
    # 6 % of 8 pixels are less than one pixel: the mildest zoom of so small an image is none.
    assert severity < 3 or not np.array_equal(damaged, pixels)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in NOT_BY_DISTANCE])
def test_the_change_grows_with_the_severity(photos, name):
    changes = [distance(CORRUPTIONS[name](photos, severity, SEEDS), photos) for severity in SEVERITIES]

    assert changes == sorted(changes)
    assert changes[-1] > 1.2 * changes[0]


def test_what_the_others_add_grows_with_the_severity(photos):
    glass = [distance(CORRUPTIONS["glass_blur"](photos, severity, SEEDS), photos) for severity in SEVERITIES]
    assert min(glass[3:]) > max(glass[:3])

    grey = np.full_like(photos, 128)
    ice = [CORRUPTIONS["frost"](grey, severity, SEEDS).astype(float).std(axis=(1, 2)).mean() for severity in SEVERITIES]
    assert ice == sorted(ice)

    stretch = [
        distance(Corruption("", CORRUPTIONS["elastic_transform"].apply, ((a, s, 0.0),) * 5)(photos, 1, SEEDS), photos)
        for a, s, _ in CORRUPTIONS["elastic_transform"].constants
    ]
    assert stretch == sorted(stretch)
    assert stretch[0] == 0


@every_corruption
def test_depends_on_image_and_seed_alone(photos, corruption):
    together = corruption(photos, 3, SEEDS)
    alone = corruption(photos[7:8], 3, SEEDS[7:8])

    assert np.array_equal(together[7:8], alone)


@pytest.mark.parametrize(
    "name", ["gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog",
             "elastic_transform"],
)  # fmt: skip
def test_another_seed_gives_another_image_where_chance_has_a_part(photos, name):
    assert not np.array_equal(CORRUPTIONS[name](photos[:1], 5, [1]), CORRUPTIONS[name](photos[:1], 5, [2]))


def test_brightness_adds_to_grey_and_keeps_the_hue():
    grey = np.full((1, 4, 4, 1), 100, np.uint8)
    assert (CORRUPTIONS["brightness"](grey, 2, [0]) == round(100 + 0.1 * 255)).all()
    assert (CORRUPTIONS["brightness"](np.full((1, 4, 4, 1), 250, np.uint8), 5, [0]) == 255).all()

    coloured = np.broadcast_to(np.array([200, 100, 50], np.uint8), (1, 4, 4, 3))
    brighter = CORRUPTIONS["brightness"](coloured, 1, [0])[0, 0, 0]
    factor = (200 + 0.05 * 255) / 200
    assert brighter.tolist() == [round(200 * factor), round(100 * factor), round(50 * factor)]

    assert (CORRUPTIONS["brightness"](np.zeros((1, 4, 4, 3), np.uint8), 4, [0]) == round(0.2 * 255)).all()


def test_contrast_shrinks_the_distance_from_the_mean():
    halves = np.zeros((1, 4, 4, 1), np.uint8)
    halves[:, :, 2:] = 200

    assert np.unique(CORRUPTIONS["contrast"](halves, 2, [0])).tolist() == [50, 150]
    assert np.unique(CORRUPTIONS["contrast"](halves, 5, [0])).tolist() == [85, 115]


def test_jpeg_is_what_pillow_makes_of_it(photos):
    file = BytesIO()
    Image.fromarray(photos[3]).save(file, "JPEG", quality=50)

    assert np.array_equal(CORRUPTIONS["jpeg_compression"](photos[3:4], 4, [0])[0], np.asarray(Image.open(file)))


def test_pixelate_averages_blocks():
    checks = np.zeros((1, 20, 20, 1), np.uint8)
    checks[:, ::2] = 100
    halved = Corruption("half", CORRUPTIONS["pixelate"].apply, ((0.5,),) * 5)

    assert (halved(checks, 1, [0]) == 50).all()


@pytest.mark.parametrize(
    "name", ["defocus_blur", "motion_blur", "zoom_blur", "glass_blur", "elastic_transform", "pixelate"]
)
def test_what_only_moves_light_about_leaves_an_even_image_as_it_is(name):
    even = np.full((1, 32, 32, 3), 77, np.uint8)

    assert np.array_equal(CORRUPTIONS[name](even, 5, [0]), even)


def test_noise_is_as_strong_as_published():
    grey = np.full((1, 64, 64, 3), 128, np.uint8)

    gaussian = CORRUPTIONS["gaussian_noise"](grey, 3, [0]) / 255
    assert gaussian.std() == pytest.approx(0.08, rel=0.03)
    shot = CORRUPTIONS["shot_noise"](grey, 3, [0]) / 255
    assert shot.std() == pytest.approx((128 / 255 / 100) ** 0.5, rel=0.03)
    impulse = CORRUPTIONS["impulse_noise"](grey, 5, [0])
    assert (impulse == 0).mean() == pytest.approx(0.035, abs=0.005)
    assert (impulse == 255).mean() == pytest.approx(0.035, abs=0.005)


@pytest.mark.parametrize("severity", [0, 6])
def test_another_severity_is_refused(severity):
    with pytest.raises(RequestError, match=f"expected a severity from 1 to 5, got {severity}"):
        CORRUPTIONS["fog"](np.zeros((1, 8, 8, 1), np.uint8), severity, [0])


def test_images_of_another_kind_are_refused():
    with pytest.raises(RequestError, match=r"1 or 3\), got uint8 \(1, 8, 8, 4\)"):
        CORRUPTIONS["fog"](np.zeros((1, 8, 8, 4), np.uint8), 1, [0])
