"""A server with the fake detector in a thread of its own, and an address without one."""

import socket
from collections.abc import Iterator

import pytest

from service.server import running_server
from tests.service.conftest import QUICK
from tests.service.fakes import FakeDetector


@pytest.fixture(scope="module")
def detector() -> FakeDetector:
    return FakeDetector()


@pytest.fixture(scope="module")
def target(detector: FakeDetector) -> Iterator[str]:
    with running_server(detector, QUICK) as target:
        yield target


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where no server answers."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"
