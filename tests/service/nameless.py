"""A call of gRPC as bytes on the wire, whose method has a name that is no UTF-8: no client library sends one."""

import struct

_HEADERS, _SETTINGS, _END_HEADERS = 1, 4, 4


def nameless_call():
    """With what a client says first on a new connection."""
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"\xe8x"), (b":authority", b"a"),
              (b"te", b"trailers"), (b"content-type", b"application/grpc")]  # fmt: skip
    block = b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0) + _frame(_HEADERS, _END_HEADERS, 1, block)


def _frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload
