import socket
import threading

import pytest

from pathguard.client import InputError, RefusedError, TimedOutError, UnreachableError
from pathguard.load import Steady, Window, agree, measure_load
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
        ([b"x"], {}, "expected a number of calls, a duration or steady windows, got none"),
        ([b"x"], {"calls": 0}, "expected at least 1 call, got 0"),
        ([b"x"], {"calls": 1, "concurrency": 0}, "expected a concurrency of at least 1, got 0"),
        ([b"x"], {"calls": 1, "images_per_call": 1025}, "expected 1 to 1024 images in a call, got 1025"),
        ([b"x"], {"duration_seconds": 0.0}, "expected a duration above 0 s, got 0"),
        ([b"x"], {"calls": 1, "concurrency": 1, "rate": 1.0}, "expected a concurrency or a rate, got both"),
        ([b"x"], {"calls": 1, "rate": 0.0}, "expected a rate above 0 calls per second, got 0"),
        ([b"x"], {"calls": 1, "steady": Steady()}, "expected steady windows, or a number of calls"),
        ([b"x"], {"steady": Steady(most_windows=2)}, "at least 3 windows, got 2 s, 0.1 and 2"),
    ],
)
def test_a_setting_out_of_range_is_named(images, settings, message):
    with pytest.raises(InputError, match=message):
        measure_load("127.0.0.1:1", images, **settings)


def window(calls_per_second, milliseconds):
    return Window(seconds=1.0, latencies=[milliseconds / 1000] * calls_per_second)


@pytest.mark.parametrize(
    ("windows", "agreed"),
    [
        ([window(100, 10.0)] * 2, False),
        ([window(100, 10.0)] * 3, True),
        ([window(500, 1.0), window(95, 10.0), window(100, 10.5), window(105, 9.5)], True),
        ([window(80, 10.0), window(100, 10.0), window(120, 10.0)], False),
        ([window(100, 8.0), window(100, 10.0), window(100, 12.0)], False),
        ([window(100, 10.0), window(0, 1.0), window(100, 10.0)], False),
    ],
)
def test_three_windows_agree_when_none_is_far_from_their_mean(windows, agreed):
    assert agree(windows, 0.1) is agreed


def test_a_steady_load_ends_by_itself_and_reports_the_last_three_windows(target):
    steady = Steady(window_seconds=0.1, tolerance=100.0, most_windows=50)
    report = measure_load(target, [image_of(1)], concurrency=2, steady=steady)
    assert (report.steady, report.windows, report.concurrency, report.rate) == (True, 3, 2, None)
    assert report.seconds == pytest.approx(0.3, rel=0.5)
    assert report.calls_per_second == pytest.approx(report.calls / report.seconds)


def test_a_load_that_is_never_steady_ends_and_says_so(target):
    steady = Steady(window_seconds=0.05, tolerance=1e-9, most_windows=4)
    report = measure_load(target, [image_of(1)], steady=steady)
    assert (report.steady, report.windows) == (False, 4)
    assert report.calls > 0


def test_an_open_loop_sends_at_its_rate_whether_answers_come_or_not():
    detector = FakeDetector()
    with running_server(detector, QUICK) as target:
        report = measure_load(target, [image_of(1)], rate=200.0, calls=60)
        assert (report.calls, report.rate, report.concurrency, report.steady) == (60, 200.0, None, None)
        assert report.seconds >= 59 / 200

        detector.hold()
        opener = threading.Timer(0.5, detector.gate.set)
        opener.start()
        report = measure_load(target, [image_of(1)], rate=100.0, calls=50)
        opener.join()
    # The first call waited for all of the half second, the last ones hardly: each from when it was due.
    assert report.calls == 50
    assert report.p99_milliseconds > 400
    assert report.p50_milliseconds < 400


def test_a_server_that_answers_nothing_in_time_is_said_so():
    detector = FakeDetector()
    with running_server(detector, QUICK) as target:
        detector.hold()
        steady = Steady(window_seconds=0.05, most_windows=3)
        with pytest.raises(TimedOutError, match="no answer from .* in the time that was measured"):
            measure_load(target, [image_of(1)], steady=steady)
        detector.gate.set()
