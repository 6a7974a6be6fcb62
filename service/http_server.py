"""Plain HTTP beside gRPC, in threads of its own: for metrics and for the page."""

import logging
import socket
import sys
import threading
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from service.processors import roam

_log = logging.getLogger(__name__)

# Each has a thread; more are closed at once.
MOST_CONNECTIONS = 64


class HttpServer(ThreadingHTTPServer):
    """Without the look-up of its own name, which takes seconds where there is no name server."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type) -> None:
        """Listens at `address`, host and port."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """As the base class, without the look-up."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """As the base class, unless there are too many connections."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base class, on any processor; then there is room for another."""
        try:
            roam()
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone is no error of ours; all else is logged."""
        if isinstance(error := sys.exception(), OSError):
            _log.debug("connection from %s ended: %r", client_address, error)
        else:
            _log.exception("request from %s failed", client_address)
