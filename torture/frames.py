"""HTTP/2 by hand, for clients that no library would be: slow, silent, half gone, or lying about what they send."""

import socket
import struct
import zlib
from collections.abc import Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DETECT = "/pathguard.v1.DetectionService/Detect"

_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_LARGEST_FRAME = 16_384
_INITIAL_WINDOW = 4
_FIRST_WINDOW = 65_535


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def settings(window: int | None = None) -> bytes:
    """The first frame of a connection; `window` is how many bytes of an answer the client takes at once."""
    payload = b"" if window is None else struct.pack(">HI", _INITIAL_WINDOW, window)
    return frame(_SETTINGS, 0, 0, payload)


def headers(stream: int, path: str | bytes = DETECT, encoding: str | None = None) -> bytes:
    """The head of a call, without compression of headers."""
    fields: list[tuple[str, str | bytes]] = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "torture"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    if encoding:
        fields.append(("grpc-encoding", encoding))
    block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)
    return frame(_HEADERS, _END_HEADERS, stream, block)


def message(content: bytes, *, compressed: bool = False) -> bytes:
    """gRPC's length-prefixed message."""
    return bytes([compressed]) + struct.pack(">I", len(content)) + content


def data(stream: int, content: bytes, *, last: bool = True) -> Iterator[bytes]:
    """Frames that carry `content`."""
    for start in range(0, max(1, len(content)), _LARGEST_FRAME):
        end = last and start + _LARGEST_FRAME >= len(content)
        yield frame(_DATA, _END_STREAM if end else 0, stream, content[start : start + _LARGEST_FRAME])


def exchange(connection: socket.socket, head: bytes, body: bytes) -> bytes:
    """Sends a call as fast as the other side lets it come (RFC 9113, 5.2); all that it sent until it ended the call.

    Raises:
        OSError: the connection broke, or nothing came for as long as its timeout.
    """
    connection.sendall(PREFACE + settings() + head)
    received, read, sent = b"", 0, 0
    window = {0: _FIRST_WINDOW, 1: _FIRST_WINDOW}
    first = _FIRST_WINDOW
    while True:
        while sent < len(body) and min(window.values()) > 0:
            part = body[sent : sent + min(_LARGEST_FRAME, *window.values())]
            sent += len(part)
            window = {stream: left - len(part) for stream, left in window.items()}
            connection.sendall(frame(_DATA, 0 if sent < len(body) else _END_STREAM, 1, part))
        more = connection.recv(65_536)
        received += more
        while len(received) - read >= 9:
            size, kind, flags = int.from_bytes(received[read : read + 3], "big"), received[read + 3], received[read + 4]
            stream = int.from_bytes(received[read + 5 : read + 9], "big")
            if len(received) - read < 9 + size:
                break
            payload = received[read + 9 : read + 9 + size]
            read += 9 + size
            if kind == _WINDOW_UPDATE and stream in window:
                window[stream] += int.from_bytes(payload, "big")
            elif kind == _SETTINGS and not flags & _ACK:
                for place in range(0, size, 6):
                    name, value = struct.unpack(">HI", payload[place : place + 6])
                    if name == _INITIAL_WINDOW:
                        window[1] += value - first
                        first = value
                connection.sendall(frame(_SETTINGS, _ACK, 0, b""))
            elif kind == _PING and not flags & _ACK:
                connection.sendall(frame(_PING, _ACK, 0, payload))
            elif kind in (_RST, _GOAWAY) or (kind == _HEADERS and flags & _END_STREAM):
                return received
        if not more:
            return received


def call(stream: int, request: bytes, path: str = DETECT) -> bytes:
    """A whole call in one piece."""
    return headers(stream, path) + b"".join(data(stream, message(request)))


def gzip_of_zeros(megabytes: int) -> bytes:
    """A gzip file that grows a thousandfold; above 64 MB its checksum is wrong, which nobody should live to see."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = bytes(1 << 20)
    if megabytes <= 64:
        return b"".join(packer.compress(block) for _ in range(megabytes)) + packer.flush()
    start = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + again * (megabytes - 1) + packer.flush()


def connect(target: str, seconds: float = 10.0) -> socket.socket:
    """A plain connection."""
    host, _, port = target.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=seconds)


def abort(connection: socket.socket) -> None:
    """Closes with a reset: what the other side has not read yet is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _text(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    assert len(raw) < 127 + 128
    return (bytes([len(raw)]) if len(raw) < 127 else bytes([127, len(raw) - 127])) + raw
