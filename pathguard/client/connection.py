"""How a server is reached: encryption, who is calling, retries, limits."""

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from pathguard.client.errors import InputError

TIMEOUT_SECONDS = 30.0

SERVICE = "pathguard.v1.DetectionService"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"

# `HealthCheckRequest()` and `HealthCheckResponse(status=SERVING)` on the wire: the client does without the package
# that only a server needs.
ANY_SERVICE = b""
SERVING = b"\x08\x01"

# Every one of these calls can be made twice without harm. A feed is not among them: gRPC would keep all of it in
# memory to send it again; the client sends again what has no answer.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE, "method": method} for method in ("Detect", "ListModels", "GetModel")],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # Where most calls fail, trying again would only add to the load: below half of the tokens nobody does.
    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.1},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Encryption, and who is calling.

    Attributes:
        tls: whether the connection is encrypted; so it is if one of the next three is given.
        ca: PEM file of the authorities that the server's certificate is checked with; None for the machine's.
        certificate: PEM file with the client's own certificate, where the server asks for one.
        key: PEM file with its private key.
        token: sent with every call; None for none.
        allow_insecure: whether a token may go to another machine without encryption.
    """

    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: str | None = None
    allow_insecure: bool = False

    def credentials(self, target: str) -> grpc.ChannelCredentials | None:
        """What to encrypt the connection to `target` with; None for no encryption.

        Raises:
            InputError: a file cannot be read, one of certificate and key is missing, or a token would go to another
                machine for everybody to read.
        """
        if (self.certificate is None) != (self.key is None):
            raise InputError("expected both a certificate and its key, got one of them")
        if not (self.tls or self.ca or self.certificate):
            if self.token is not None and not self.allow_insecure and not _is_here(target):
                raise InputError(f"expected TLS for a token that goes to another machine, got none for {target}")
            return None
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What goes with every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)


NO_ACCESS = Access()


def options(max_message_bytes: int) -> list[tuple[str, Any]]:
    """How a channel behaves."""
    return [
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        # gRPC keeps a request for retries only up to 256 KiB; a larger one would fail at the first broken connection.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # A server that restarts is found again soon; gRPC's own longest pause is two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]


def check_timeout(timeout_seconds: float) -> None:
    """Refuse a timeout that is no time.

    Raises:
        InputError: it is not above 0.
    """
    if not timeout_seconds > 0:
        raise InputError(f"expected a timeout above 0 s, got {timeout_seconds}")


def _read(file: Path | None) -> bytes | None:
    try:
        return None if file is None else file.read_bytes()
    except OSError as error:
        raise InputError(f"expected a PEM file that can be read, got {file}: {error.strerror or error}") from None


def _is_here(target: str) -> bool:
    host = target.rpartition(":")[0].strip("[]")
    if host == "localhost" or target.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
