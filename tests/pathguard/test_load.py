import socket

import pytest

from pathguard.client import InputError, RefusedError, UnreachableError
from pathguard.load import measure_load
from service.config import ServiceConfig
from service.server import running_server
from tests.service.conftest import QUICK
from tests.service.fakes import FakeDetector, image_of


@pytest.fixture(scope="module")
def target():
    with running_server(FakeDetector(), QUICK) as target:
        yield target


def test_every_call_and_image_is_counted(target):
    report = measure_load(target, [image_of(n) for n in range(5)], concurrency=3, images_per_call=2, calls=40)
    assert (report.calls, report.images, report.errors) == (40, 80, 0)
    assert 0 < report.p50_milliseconds <= report.p90_milliseconds <= report.p99_milliseconds
    assert report.images_per_second == pytest.approx(80 / report.seconds)


def test_a_duration_ends_the_load(target):
    report = measure_load(target, [image_of(1)], concurrency=2, duration_seconds=0.05)
    assert report.calls >= 2
    assert report.errors == 0


def test_an_image_that_comes_back_with_an_error_is_counted_as_one(target):
    report = measure_load(target, [image_of(1), b"no image"], images_per_call=2, calls=3)
    assert (report.calls, report.images, report.errors) == (3, 3, 3)


def test_a_load_of_which_no_call_was_answered_says_why():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(UnreachableError, match="no server answers"):
            measure_load(f"127.0.0.1:{held.getsockname()[1]}", [image_of(1)], calls=2)


def test_a_load_that_the_server_refuses_says_why():
    config = ServiceConfig(port=0, max_images_per_request=2, notice_seconds=0.0)
    with running_server(FakeDetector(), config) as target, pytest.raises(RefusedError, match="expected 1 to 2 images"):
        measure_load(target, [image_of(1)], images_per_call=3, calls=1)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        ([], {"calls": 1}, "expected at least one image, got none"),
        ([b"x"], {}, "expected a number of calls or a duration, got neither"),
        ([b"x"], {"calls": 0}, "expected at least 1 call, got 0"),
        ([b"x"], {"calls": 1, "concurrency": 0}, "expected a concurrency of at least 1, got 0"),
        ([b"x"], {"calls": 1, "images_per_call": 1025}, "expected 1 to 1024 images in a call, got 1025"),
        ([b"x"], {"duration_seconds": 0.0}, "expected a duration above 0 s, got 0"),
    ],
)
def test_a_setting_out_of_range_is_named(images, settings, message):
    with pytest.raises(InputError, match=message):
        measure_load("127.0.0.1:1", images, **settings)
