"""The page for people, and the questions that it asks: plain HTTP on a port of its own, in threads of its own.

Everything comes from here, so that the page works without any other network. An image is uploaded as the body of a
request; what is too large is refused before it is read. A page of another site can neither ask nor read: requests must
name this machine's loopback (not where the page has another address, whose names are not known), uploads must be of a
type that browsers send to other sites only after asking, and nothing is allowed to be asked.
"""

import io
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from typing import Final
from urllib.parse import SplitResult, parse_qs, urlsplit

from detector.errors import ArtifactError, ImageError, RequestError
from detector.interpretation.explanation import Explanation
from service.config import UiConfig, is_loopback
from service.errors import AddressError, InvalidRequestError, UnavailableError, UnknownModelError
from service.http_server import HttpServer
from service.model import Model
from service.ui.answers import bent, explained, model_of
from service.ui.recent import RecentVerdicts

_log = logging.getLogger(__name__)

_FILES: Final = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_UPLOAD_TYPE: Final = "application/octet-stream"
# How long a browser may take over a whole request, so that one that says little holds no thread for ever.
_REQUEST_SECONDS: Final = 30.0
# Images that are explained at once; more wait their turn, many more are sent away.
_WAITING: Final = 16

Query = Mapping[str, Sequence[str]]


class PageServer:
    """Listens from the beginning; `close` ends it. Several browsers may ask at once."""

    def __init__(self, config: UiConfig, max_pixels: int, find: Callable[[], Model], recent: RecentVerdicts) -> None:
        """Listens.

        Args:
            config: where.
            max_pixels: largest height times width of an uploaded image.
            find: the model to ask now; called from any thread.
            recent: the last verdicts, of calls too.

        Raises:
            AddressError: the port is in use, or the host is not an address of this machine.
        """
        host = config.host.strip("[]")
        asked = _Asked(config, max_pixels, find, recent)
        handler = type("_Handler", (_PageHandler,), {"asked": asked})
        try:
            self._server = HttpServer((host, config.port or 0), handler)
        except OSError as error:
            raise AddressError(
                f"expected an address for the page, got {host}:{config.port}: {error.strerror}"
            ) from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _Asked:
    """The answers to what the page asks."""

    def __init__(self, config: UiConfig, max_pixels: int, find: Callable[[], Model], recent: RecentVerdicts) -> None:
        self.max_upload_bytes = config.max_upload_bytes
        self.any_host = not is_loopback(config.host)
        self._max_pixels = max_pixels
        self._find = find
        self._recent = recent
        self.room = threading.BoundedSemaphore(_WAITING)

    def model(self) -> dict[str, object]:
        model = self._find()
        said = model_of(model.explainer(), model.max_false_alarm_rate)
        return {"name": model.name, "version": model.model_version, "max_upload_bytes": self.max_upload_bytes, **said}

    def recent(self) -> dict[str, object]:
        return self._recent.summary()

    def explain(self, content: bytes, _: Query) -> dict[str, object]:
        model = self._find()
        return self._noted(*explained(model.explainer(), model.max_false_alarm_rate, content, self._max_pixels))

    def attack(self, content: bytes, query: Query) -> dict[str, object]:
        model = self._find()
        return self._noted(*bent(model.explainer(), model.max_false_alarm_rate, content, self._max_pixels, query))

    def _noted(self, found: Explanation, answer: dict[str, object]) -> dict[str, object]:
        self._recent.add("page", found.named(found.label), found.p_value, found.flagged)
        return answer


class _Incoming(io.RawIOBase):
    """What comes on a connection, until `deadline`."""

    def __init__(self, connection: socket.socket) -> None:
        self.deadline = 0.0
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("expected a whole request in time")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _PageHandler(BaseHTTPRequestHandler):
    asked: _Asked
    protocol_version = "HTTP/1.1"
    server_version = "pathguard"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._incoming = _Incoming(self.connection)
        self.rfile = io.BufferedReader(self._incoming)

    def handle_one_request(self) -> None:
        self._incoming.deadline = time.monotonic() + _REQUEST_SECONDS
        super().handle_one_request()

    def do_GET(self) -> None:
        if not self._is_for_us() or (url := self._url()) is None:
            return
        path = url.path
        if path in _FILES:
            name, kind = _FILES[path]
            self._send(HTTPStatus.OK, kind, files("service.ui").joinpath(name).read_bytes())
        elif path == "/api/model":
            self._answer(self.asked.model)
        elif path == "/api/recent":
            self._answer(self.asked.recent)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"expected a page of this server, got {path}")

    def do_POST(self) -> None:
        # Whatever is refused has not been read: what follows on this connection would be taken for a request.
        self.close_connection = True
        if not self._is_for_us() or (url := self._url()) is None:
            return
        answer = {"/api/explain": self.asked.explain, "/api/attack": self.asked.attack}.get(url.path)
        if answer is None:
            self._refuse(HTTPStatus.NOT_FOUND, f"expected /api/explain or /api/attack, got {url.path}")
            return
        if self.headers.get("Content-Type") != _UPLOAD_TYPE:
            self._refuse(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"expected the Content-Type {_UPLOAD_TYPE}, got another or none"
            )
            return
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "expected the Content-Length of the image, got none")
            return
        limit = self.asked.max_upload_bytes
        if len(length) > 15 or int(length) > limit:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"expected an image file of at most {limit / 2**20:g} MiB, got {int(length[:15]) / 2**20:.0f} MiB",
            )
            return
        content = self.rfile.read(int(length))
        if len(content) < int(length):  # the browser has gone
            return
        if not self.asked.room.acquire(blocking=False):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "expected fewer images at once; try again in a moment")
            return
        try:
            self._answer(lambda: answer(content, parse_qs(url.query)))
        finally:
            self.asked.room.release()

    def _url(self) -> SplitResult | None:
        """What is asked for; None where that is no address, and the browser has been told."""
        try:
            return urlsplit(self.path)
        except ValueError:
            self.close_connection = True
            self._refuse(HTTPStatus.BAD_REQUEST, f"expected the address of a page, got {self.path[:200]!r}")
            return None

    def _is_for_us(self) -> bool:
        """Whether the request names this machine's loopback: another site could point a name of its own here.

        On a page with another address, every name passes.
        """
        host = self.headers.get("Host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.asked.any_host or is_loopback(name):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, f"expected a loopback host such as 127.0.0.1, got {host!r}")
        return False

    def _answer(self, answer: Callable[[], dict[str, object]]) -> None:
        try:
            found = answer()
        except (ImageError, InvalidRequestError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except (ArtifactError, RequestError, UnknownModelError, UnavailableError) as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except Exception:
            number = secrets.token_hex(8)
            _log.exception("the page's question failed, id %s", number)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"internal error, id {number}")
        else:
            self._send(HTTPStatus.OK, "application/json", json.dumps(found).encode())

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        self._send(status, "application/json", json.dumps({"error": sentence}).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.connection.settimeout(_REQUEST_SECONDS)
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's own name
        _log.debug(format, *args)
