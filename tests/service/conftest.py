"""A warm server with the fake detector, in the test's own event loop."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest

from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from service.config import ServiceConfig
from service.server import serving
from tests.service.fakes import FakeDetector

QUICK = ServiceConfig(port=0, max_batch=4, notice_seconds=0.0, drain_seconds=5.0, max_message_bytes=1_000_000)


@dataclass(frozen=True, slots=True)
class Served:
    """A fake detector, a channel to the server that asks it, and the stub on it."""

    detector: FakeDetector
    channel: grpc.aio.Channel
    stub: DetectionServiceStub
    target: str


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    detector = FakeDetector()
    async with serving(detector, QUICK) as port:
        target = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(target) as channel:
            yield Served(detector, channel, DetectionServiceStub(channel), target)
        detector.gate.set()
