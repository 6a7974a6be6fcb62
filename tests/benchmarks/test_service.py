import asyncio
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.overload import overload
from benchmarks.peers.sides import ours
from benchmarks.server import foreign_server, free_port
from benchmarks.service import DETECT, images_per_second, medians, noise, raw_request
from service.config import ServiceConfig
from service.server import running_server
from tests.service.conftest import QUICK
from tests.service.fakes import SPEC, FakeDetector


class SlowDetector(FakeDetector):
    """Takes 5 ms an image."""

    def detect(self, pixels):
        time.sleep(0.005 * len(pixels))
        return super().detect(pixels)


def test_our_side_asks_the_server_and_reads_the_labels():
    pixels = noise(SPEC, 5)
    with running_server(FakeDetector(), QUICK) as target, ours(target).caller() as ask:
        assert ask(ours(target).request(pixels)) == [int(value) % 3 for value in pixels[:, 0, 0, 0]]


def test_images_per_second_are_counted_over_all_callers():
    with running_server(SlowDetector(), QUICK) as target:
        side = ours(target)
        rate = images_per_second(side, side.request(noise(SPEC, 4)), 4, 2, 0.5)
    assert 50 < rate <= 210


def test_overload_tells_refusals_from_answers_and_counts_what_came_too_late():
    body = raw_request(noise(SPEC, 4)).SerializeToString()
    config = ServiceConfig(port=0, max_batch=4, notice_seconds=0.0, max_pending_images=8, max_images_per_request=4)
    with running_server(SlowDetector(), config) as target:
        seen = asyncio.run(overload(target, DETECT, body, calls_per_second=200, seconds=1, deadline=5))
    assert seen.other == {}
    assert seen.late == 0
    assert len(seen.answers) > 10
    assert len(seen.refusals) > 10
    assert len(seen.answers) + len(seen.refusals) == 200


def test_medians_are_of_each_function_by_itself(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("benchmarks.timing.time", SimpleNamespace(perf_counter=lambda: clock.now))

    def taking(seconds):
        def call():
            clock.now += seconds

        return call

    assert medians(5, taking(0.001), taking(0.25)) == pytest.approx([1.0, 250.0])


def test_noise_is_the_same_each_time():
    assert np.array_equal(noise(SPEC, 3), noise(SPEC, 3))


def test_a_foreign_server_that_ends_says_why(tmp_path):
    def answers():
        raise ConnectionRefusedError

    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(RuntimeError, match="no such model"),
        foreign_server(command, tmp_path / "log", answers),
    ):
        pass


def test_a_foreign_server_goes_with_all_its_processes(tmp_path):
    port = free_port()
    inner = f"import http.server as h; h.HTTPServer(('127.0.0.1', {port}), h.SimpleHTTPRequestHandler).serve_forever()"
    outer = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}]).wait()"

    def answers():
        import socket

        socket.create_connection(("127.0.0.1", port), 1).close()

    with foreign_server([sys.executable, "-c", outer], tmp_path / "log", answers):
        answers()
    with pytest.raises(ConnectionRefusedError):
        answers()
