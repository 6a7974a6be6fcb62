import http.client
import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import grpc
import numpy as np
import pytest

from detector.images import encode_png
from detector.scoring.detector import Detector
from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from service import http_server
from service.config import ServiceConfig, UiConfig
from service.errors import AddressError, ConfigError
from service.server import Server
from service.ui import page_server
from service.ui.page_server import PageServer
from service.ui.recent import RecentVerdicts
from tests.service.fakes import FakeDetector

OCTETS = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True)
class Browser:
    """What a browser does, at a page server."""

    port: int

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def upload(self, path, content, **headers):
        status, body, _ = self.ask("POST", path, content, {**OCTETS, **headers})
        return status, json.loads(body)


@pytest.fixture
def detector(explained_bundle) -> Detector:
    return Detector(explained_bundle, "digits")


@pytest.fixture
def browser(detector):
    server = PageServer(UiConfig(port=0, max_upload_bytes=100_000), 10_000, lambda: detector, RecentVerdicts())
    yield Browser(server.port)
    server.close()


@pytest.fixture
def photos(digits):
    return [encode_png(pixels) for pixels in digits.test.pixels(slice(0, 8))]


def test_an_image_is_explained_as_the_detector_judges_it(browser, detector, digits, photos):
    said = detector.detect(digits.test.pixels(slice(0, 8)))
    for place, photo in enumerate(photos):
        status, answer = browser.upload("/api/explain", photo)
        assert status == 200
        assert answer["label"] == detector.class_names[said.labels[place]]
        assert answer["p_value"] == said.p_values[place]
        assert answer["path"] == "".join(str(int(bit)) for bit in said.paths.bits[place])
        assert len(answer["usual_path"]) == len(answer["path"])


def test_an_attacked_image_is_shown_with_its_bent_path(browser, photos):
    _, before = browser.upload("/api/explain", photos[0])
    status, after = browser.upload("/api/attack?method=fgsm&levels=32", photos[0])
    assert status == 200
    assert after["image"] != before["image"]
    assert after["path"] != before["path"]
    _, unmoved = browser.upload("/api/attack?method=pgd&levels=0", photos[0])
    assert (unmoved["image"], unmoved["path"]) == (before["image"], before["path"])


@pytest.mark.parametrize(
    "query", ["method=cw&levels=3", "method=fgsm", "method=pgd&levels=300", "levels=nan&method=pgd"]
)
def test_an_attack_that_is_not_offered_is_refused(browser, photos, query):
    status, answer = browser.upload(f"/api/attack?{query}", photos[0])
    assert status == 400
    assert "expected" in answer["error"]


def test_a_damaged_file_gets_a_sentence(browser, photos):
    status, answer = browser.upload("/api/explain", photos[0][:60])
    assert status == 400
    assert answer["error"].startswith("expected a whole image file, got a damaged one")
    assert browser.upload("/api/explain", b"text")[1]["error"].startswith("expected a JPEG, PNG or WebP file")
    assert browser.upload("/api/explain", b"")[1]["error"] == "expected an image file, got 0 bytes"


def test_an_image_of_another_size_gets_a_sentence(browser):
    status, answer = browser.upload("/api/explain", encode_png(np.zeros((9, 8, 1), np.uint8)))
    assert (status, answer["error"]) == (400, "expected 8 x 8 pixels, got 9 x 8")


def test_a_large_upload_is_refused_before_it_is_read(browser):
    """The head alone is sent: the answer comes although the 50 MB never do."""
    with socket.create_connection(("127.0.0.1", browser.port), timeout=10) as connection:
        connection.sendall(
            b"POST /api/explain HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
            b"Content-Length: 52428800\r\n\r\n"
        )
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert b"Connection: close" in head
    assert json.loads(body)["error"] == "expected an image file of at most 0.0953674 MiB, got 50 MiB"


HEAD = (
    b"POST /api/explain HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\n"
)


def test_uploads_that_never_come_keep_nobody_out(browser, photos):
    with ExitStack() as idle:
        for _ in range(20):
            connection = idle.enter_context(socket.create_connection(("127.0.0.1", browser.port), timeout=10))
            connection.sendall(HEAD + b"part")
        assert browser.ask("GET", "/api/recent")[0] == 200  # the others have been taken on by now
        assert browser.upload("/api/explain", photos[0])[0] == 200


@pytest.mark.parametrize("sent", [HEAD, b"GET / HTTP/1.1\r\nX: "], ids=["body", "head"])
def test_a_request_that_trickles_in_is_cut_off(browser, monkeypatch, sent):
    monkeypatch.setattr(page_server, "_REQUEST_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", browser.port), timeout=0.05) as connection:
        connection.sendall(sent)
        for _ in range(100):
            with suppress(TimeoutError):
                if not connection.recv(1):
                    return
            connection.sendall(b"x")
    pytest.fail("it may go on for ever")


def test_connections_beyond_the_most_are_closed_at_once(detector, monkeypatch):
    monkeypatch.setattr(http_server, "MOST_CONNECTIONS", 2)
    server = PageServer(UiConfig(port=0), 10_000, lambda: detector, RecentVerdicts())
    try:
        with ExitStack() as idle:
            for _ in range(2):
                idle.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as more:
                assert more.recv(1) == b""
        for _ in range(100):  # until the server has seen that they have gone
            with suppress(OSError, http.client.HTTPException):
                assert Browser(server.port).ask("GET", "/")[0] == 200
                return
        pytest.fail("nobody is let in again")
    finally:
        server.close()


def test_an_address_that_is_none_is_refused(browser, capfd):
    for method in (b"GET", b"POST"):
        with socket.create_connection(("127.0.0.1", browser.port), timeout=10) as connection:
            connection.sendall(method + b" http://[ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 400")
    assert "Traceback" not in capfd.readouterr().err


def test_a_browser_that_has_gone_leaves_no_traceback(browser, capfd, caplog):
    caplog.set_level("DEBUG", "service.http_server")
    with socket.create_connection(("127.0.0.1", browser.port), timeout=10) as connection:
        connection.sendall(HEAD)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset
    for _ in range(100):
        if "ended: ConnectionResetError" in caplog.text:
            break
        time.sleep(0.05)
    assert "ended: ConnectionResetError" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("length", [None, "-1", "many", "9" * 30])
def test_an_upload_of_no_known_size_is_refused(browser, length):
    with socket.create_connection(("127.0.0.1", browser.port), timeout=10) as connection:
        line = b"" if length is None else f"Content-Length: {length}\r\n".encode()
        connection.sendall(
            b"POST /api/explain HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
            + line
            + b"\r\n"
        )
        assert connection.recv(65536).startswith((b"HTTP/1.1 411", b"HTTP/1.1 413"))


def test_two_browsers_at_once_each_get_their_own_answer(browser, photos):
    alone = [browser.upload("/api/explain", photo)[1]["path"] for photo in photos]
    with ThreadPoolExecutor(8) as browsers:
        for _ in range(3):
            asked = [browsers.submit(browser.upload, "/api/explain", photo) for photo in photos]
            attacks = [browsers.submit(browser.upload, "/api/attack?method=pgd&levels=9", photo) for photo in photos]
            assert [answer.result()[1]["path"] for answer in asked] == alone
            assert all(answer.result()[0] == 200 for answer in attacks)


def test_pages_of_other_sites_can_neither_ask_nor_point_their_names_here(browser, photos):
    status, body, _ = browser.ask("POST", "/api/explain", photos[0], {"Content-Type": "text/plain"})
    assert (status, json.loads(body)["error"]) == (
        415,
        "expected the Content-Type application/octet-stream, got another or none",
    )
    status, body, _ = browser.ask("GET", "/api/recent", headers={"Host": "evil.example:80"})
    assert status == 403
    assert browser.ask("OPTIONS", "/api/explain")[0] == 501
    assert browser.upload("/api/explain", photos[0], Host="evil.example")[0] == 403


def test_the_page_comes_from_here_alone(browser):
    for path in ("/", "/page.css", "/page.js"):
        status, body, headers = browser.ask("GET", path)
        assert status == 200
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in body
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    status, body, _ = browser.ask("GET", "/../server.py")
    assert status == 404


def test_the_model_and_recent_verdicts_are_told(browser, photos):
    status, body, _ = browser.ask("GET", "/api/model")
    said = json.loads(body)
    assert (status, said["name"], said["height"], said["max_upload_bytes"]) == (200, "digits", 8, 100_000)
    browser.upload("/api/explain", photos[0])
    recent = json.loads(browser.ask("GET", "/api/recent")[1])
    assert recent["images"] == 1
    assert recent["verdicts"][0]["source"] == "page"


def test_a_bundle_without_statistics_says_which_command_makes_them(photos):
    server = PageServer(UiConfig(port=0), 10_000, FakeDetector, RecentVerdicts())
    try:
        status, answer = Browser(server.port).upload("/api/explain", photos[0])
    finally:
        server.close()
    assert status == 503
    assert "pathguard interpret" in answer["error"]


def test_a_bug_gets_an_id_and_no_details(photos, caplog):
    def broken():
        raise KeyError("secret")

    server = PageServer(UiConfig(port=0), 10_000, broken, RecentVerdicts())
    try:
        status, answer = Browser(server.port).upload("/api/explain", photos[0])
    finally:
        server.close()
    assert status == 500
    assert "secret" not in answer["error"]
    assert "secret" in caplog.text


def test_another_model_is_explained_once_it_is_in_service(detector, fitted_bundle, photos):
    served = [detector]
    server = PageServer(UiConfig(port=0), 10_000, lambda: served[0], RecentVerdicts())
    try:
        assert Browser(server.port).upload("/api/explain", photos[0])[0] == 200
        served[0] = FakeDetector()
        assert Browser(server.port).upload("/api/explain", photos[0])[0] == 503
    finally:
        server.close()


def test_a_port_that_is_taken_is_told(browser, detector):
    with pytest.raises(AddressError, match="expected an address for the page"):
        PageServer(UiConfig(port=browser.port), 10_000, lambda: detector, RecentVerdicts())


def test_the_page_stays_on_this_machine_unless_allowed(detector):
    with pytest.raises(ConfigError, match="ui_host"):
        ServiceConfig(ui=UiConfig(port=0, host="0.0.0.0"))


async def test_a_server_shows_the_verdicts_of_its_calls(detector, digits):
    server = Server(detector, ServiceConfig(port=0, max_batch=4, notice_seconds=0.0, ui=UiConfig(port=0)))
    port = await server.start()
    await server.warm_up()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            images = [pb.Image(encoded=encode_png(pixels)) for pixels in digits.test.pixels(slice(0, 3))]
            await DetectionServiceStub(channel).Detect(pb.DetectRequest(images=images))
        said = {}

        def look():
            said.update(json.loads(Browser(server.page_port).ask("GET", "/api/recent")[1]))

        looking = threading.Thread(target=look)
        looking.start()
        looking.join()
    finally:
        await server.stop()
    assert said["images"] == 3
    assert {verdict["source"] for verdict in said["verdicts"]} == {"call"}
