import hashlib
import json

import pytest

from service.access.callers import FULL, VERDICT, address_name
from service.access.credentials import parse_credentials
from service.errors import ForbiddenError, SettingsFileError


def digest(token):
    return hashlib.sha256(token.encode()).hexdigest()


def parse(**content):
    return parse_credentials([json.dumps(content).encode()])


def test_a_token_is_known_by_its_digest():
    known = parse(
        roles={"shop": {"sees": ["label", "score"]}},
        tokens=[
            {"name": "web", "role": "shop", "sha256": digest("one")},
            {"name": "ops", "role": "full", "sha256": digest("two").upper()},
        ],
    )
    assert (known.of_token("one").name, known.of_token("two").role) == ("token:web", FULL)
    assert known.of_token("one").role.sees == {"label", "score"}
    assert [known.of_token(token) for token in ("", "ONE", digest("one"), "\ud800")] == [None] * 4


def test_a_role_refuses_what_it_may_not_see_or_set():
    FULL.check_sets("max_false_alarm_rate")
    FULL.check_sees("path")
    with pytest.raises(ForbiddenError, match="without max_false_alarm_rate, which the role verdict may not set"):
        VERDICT.check_sets("max_false_alarm_rate")
    with pytest.raises(ForbiddenError, match="asks for no path, which the role verdict may not see"):
        VERDICT.check_sees("path")


def test_a_certificate_is_known_by_any_of_its_names():
    known = parse(certificates=[{"name": "batch.example.org", "role": "verdict"}], anonymous="verdict")
    assert known.of_certificate(["other", "batch.example.org"]).name == "certificate:batch.example.org"
    assert known.of_certificate([]) is None
    assert known.anonymous is VERDICT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected credentials in JSON"),
        ("[]", "expected the file to be an object, got list"),
        ('{"users": []}', "expected anonymous, certificates, roles, tokens in the file, got users"),
        ('{"roles": {"x": {"sees": ["all"]}}}', r"expected roles.x.sees to be a list of label, .* got \['all'\]"),
        ('{"roles": {"x": {"sees": ["label"], "sets": "x"}}}', "expected roles.x.sets to be a list of max_false"),
        ('{"tokens": {}}', "expected tokens to be a list, got dict"),
        ('{"tokens": [{"name": "a", "role": "full"}]}', r"expected name, role, sha256 in tokens\[0\], got name, role"),
        ('{"tokens": [{"name": "a", "role": "full", "sha256": "s3cret"}]}', r"in tokens\[0\], 64 hexadecimal digits"),
        ('{"tokens": [{"name": "a", "role": "full", "sha256": 7}]}', r"in tokens\[0\], 64 hexadecimal digits"),
        ('{"tokens": [{"name": "", "role": "full", "sha256": "00"}]}', r"expected a token's SHA-256 in tokens\[0\]"),
        ('{"certificates": [{"name": "", "role": "full"}]}', r"expected a name in certificates\[0\], got ''"),
        ('{"anonymous": "nobody"}', "expected a role of full, verdict in anonymous, got 'nobody'"),
    ],
)
def test_anything_unknown_or_missing_is_told_in_one_line_without_the_secret(content, message):
    with pytest.raises(SettingsFileError, match=message) as caught:
        parse_credentials([content.encode()])
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_token_twice_is_refused():
    entry = {"name": "a", "role": "full", "sha256": digest("one")}
    with pytest.raises(SettingsFileError, match=r"expected each token once, got that of tokens\[1\] twice"):
        parse(tokens=[entry, {**entry, "name": "b"}])


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("ipv4:192.0.2.7:4711", "ip:192.0.2.7"),
        ("ipv6:%5B::1%5D:4711", "ip:::1"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:4711", "ip:2001:db8:1:2::/64"),
        ("ipv6:[::ffff:192.0.2.7]:4711", "ip:192.0.2.7"),
        ("unix:/run/socket", "ip:unix"),
        ("", "ip:unknown"),
    ],
)
def test_an_address_names_who_shows_nothing_else(peer, name):
    assert address_name(peer) == name
