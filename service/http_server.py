"""Plain HTTP beside gRPC, in threads of its own: for metrics and for the page."""

import socket
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from service.processors import roam


class HttpServer(ThreadingHTTPServer):
    """Without the look-up of its own name, which takes seconds where there is no name server."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type) -> None:
        """Listens at `address`, host and port."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """As the base class, without the look-up."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base class, on any processor."""
        roam()
        super().process_request_thread(request, client_address)
