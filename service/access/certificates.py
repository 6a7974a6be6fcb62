"""TLS from PEM files that may change while the server runs; the last good ones are kept.

gRPC asks for the certificate at each handshake, so that a new one serves from the next connection on, and connections
that are open go on. What is expired, or does not belong together, is never taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from service.config import TlsConfig
from service.errors import SettingsFileError
from service.kept_files import KeptFiles


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate chain with its key, checked.

    Attributes:
        chain: PEM, the server's own certificate first.
        key: PEM of its private key.
        client_ca: PEM of the authorities that clients' certificates must come from; None to ask for none.
        ends: when the server's certificate expires.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None
    ends: datetime

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """As gRPC takes it."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], root_certificates=self.client_ca)


def parse_certificate(
    contents: Sequence[bytes], now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> Certificate:
    """The certificate of a chain, a key and, where there is a third content, authorities for clients.

    Raises:
        SettingsFileError: no PEM, expired or not valid yet, or the key is not the certificate's.
    """
    chain, key, *rest = contents
    try:
        own = x509.load_pem_x509_certificates(chain)[0]
        private = load_pem_private_key(key, password=None)
        if rest:
            x509.load_pem_x509_certificates(rest[0])
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingsFileError(f"expected a certificate and its unencrypted key in PEM, got: {reason}") from None
    if _public(private.public_key()) != _public(own.public_key()):
        raise SettingsFileError("expected the key of the certificate, got another key")
    if not own.not_valid_before_utc <= now() <= own.not_valid_after_utc:
        raise SettingsFileError(
            f"expected a certificate that is valid now, got one for {own.not_valid_before_utc:%Y-%m-%d %H:%M} "
            f"to {own.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        )
    return Certificate(chain, key, rest[0] if rest else None, own.not_valid_after_utc)


def kept_certificate(config: TlsConfig, on_refresh: Callable[[str, bool], None]) -> KeptFiles[Certificate]:
    """The certificate that `config` names, to be looked at again.

    Raises:
        SettingsFileError: a file cannot be read, or `parse_certificate` refuses it.
    """
    files = [config.certificate, config.key, config.client_ca]
    return KeptFiles("certificate", [Path(file) for file in files if file], parse_certificate, on_refresh)


def server_credentials(kept: KeptFiles[Certificate], *, ask_clients: bool) -> grpc.ServerCredentials:
    """Credentials that follow `kept`.

    Args:
        kept: the certificate.
        ask_clients: whether a client must show a certificate of `client_ca`.
    """
    given = kept.value

    def newer() -> Any:  # None where nothing changed, which the stubs do not know
        nonlocal given
        if kept.value is given:
            return None
        given = kept.value
        return given.configuration()

    return grpc.dynamic_ssl_server_credentials(given.configuration(), newer, require_client_authentication=ask_clients)


def _public(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
