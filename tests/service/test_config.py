import pytest

from service.config import ServiceConfig
from service.errors import ConfigError


def test_nothing_set_gives_the_defaults():
    assert ServiceConfig.from_environ({}) == ServiceConfig()


def test_each_field_is_a_variable():
    environ = {"PATHGUARD_PORT": "0", "PATHGUARD_MAX_WAIT_SECONDS": "0.5", "PATHGUARD_REFLECTION": "off", "HOME": "x"}
    assert ServiceConfig.from_environ(environ) == ServiceConfig(port=0, max_wait_seconds=0.5, reflection=False)


def test_an_unknown_variable_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ConfigError, match=r"got PATHGUARD_MAXBATCH; known are .*PATHGUARD_MAX_BATCH"):
        ServiceConfig.from_environ({"PATHGUARD_MAXBATCH": "3"})


def test_a_variable_that_is_read_elsewhere_is_left_alone():
    assert ServiceConfig.from_environ({"PATHGUARD_BUNDLE": "/bundle"}) == ServiceConfig()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("PORT", "x", "expected PATHGUARD_PORT to be a whole number, got 'x'"),
        ("PORT", "70000", "expected port of 0 to 65535, got 70000"),
        ("MAX_BATCH", "0", "expected max_batch of at least 1, got 0"),
        ("DRAIN_SECONDS", "nan", "expected drain_seconds of at least 0, got nan"),
        ("DRAIN_SECONDS", "inf", "expected drain_seconds of at least 0, got inf"),
        ("REFLECTION", "maybe", "expected PATHGUARD_REFLECTION to be 1 or 0, got 'maybe'"),
        ("HOST", "", "expected host to be a name or an address, got nothing"),
        ("MAX_PENDING_IMAGES", "10", "expected max_pending_images of at least 1024, got 10"),
    ],
)
def test_a_wrong_value_gives_one_line_with_what_was_expected_and_what_came(name, text, message):
    with pytest.raises(ConfigError) as caught:
        ServiceConfig.from_environ({f"PATHGUARD_{name}": text})
    assert str(caught.value) == message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", "192.168.1.5"])
def test_an_address_that_others_can_reach_needs_the_flag(host):
    with pytest.raises(ConfigError, match="ALLOW_INSECURE"):
        ServiceConfig(host=host)
    assert ServiceConfig(host=host, allow_insecure=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"])
def test_loopback_needs_no_flag(host):
    assert ServiceConfig(host=host).host == host
