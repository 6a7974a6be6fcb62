from datetime import UTC, datetime, timedelta

import pytest
import trustme

from service.access.certificates import parse_certificate
from service.errors import SettingsFileError

AUTHORITY = trustme.CA()


def pem_of(certificate):
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    return chain, certificate.private_key_pem.bytes()


def test_a_chain_and_its_key_belong_together():
    chain, key = pem_of(AUTHORITY.issue_cert("localhost"))
    parsed = parse_certificate([chain, key, AUTHORITY.cert_pem.bytes()])
    assert (parsed.chain, parsed.key, parsed.client_ca) == (chain, key, AUTHORITY.cert_pem.bytes())
    assert parsed.ends > datetime.now(UTC)
    assert parse_certificate([chain, key]).client_ca is None


def test_another_key_is_refused():
    chain, _ = pem_of(AUTHORITY.issue_cert("localhost"))
    _, other = pem_of(AUTHORITY.issue_cert("localhost"))
    with pytest.raises(SettingsFileError, match="expected the key of the certificate, got another key"):
        parse_certificate([chain, other])


def test_an_expired_certificate_and_one_of_the_future_are_refused():
    expired = AUTHORITY.issue_cert("localhost", not_after=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(SettingsFileError, match="expected a certificate that is valid now, got one for 2"):
        parse_certificate(pem_of(expired))
    with pytest.raises(SettingsFileError, match="expected a certificate that is valid now"):
        parse_certificate(pem_of(AUTHORITY.issue_cert("localhost")), lambda: datetime(1999, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("content", [b"", b"text", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_pem_is_refused_in_one_line(part, content):
    contents = [*pem_of(AUTHORITY.issue_cert("localhost")), AUTHORITY.cert_pem.bytes()]
    contents[part] = content
    with pytest.raises(SettingsFileError, match="expected a certificate and its unencrypted key in PEM") as caught:
        parse_certificate(contents)
    assert "\n" not in str(caught.value)
