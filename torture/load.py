"""Callers who go on calling beside whatever is done to the server; their answers have to be right, and in time."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from protos.pathguard.v1 import detection_pb2 as pb
from torture import frames
from torture.known import Known
from torture.report import Outcome
from torture.servers import OPTIONS

PATIENCE_SECONDS = 5.0
_TIMEOUT_SECONDS = 30.0
_SHOWN_PROBLEMS = 5


@dataclass(slots=True)
class Load:
    """What the callers have seen so far.

    Attributes:
        latencies: seconds of each answered call.
        problems: wrong answers, and calls that failed.
    """

    latencies: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def wait_for(self, more: int, seconds: float = 30.0) -> bool:
        """Whether so many more calls are answered in time."""
        wanted, ends = len(self.latencies) + more, time.perf_counter() + seconds
        while len(self.latencies) < wanted and time.perf_counter() < ends:
            time.sleep(0.01)
        return len(self.latencies) >= wanted


@contextmanager
def load(
    target: str,
    known: Known,
    outcome: Outcome,
    *,
    callers: int = 1,
    pause: float = 0.01,
    calls_per_connection: int | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> Iterator[Load]:
    """Calls during the block; what was wrong, and how slow it was, is noted in `outcome`.

    Args:
        target: the server's `HOST:PORT`.
        known: what is asked, one image a call.
        outcome: where figures and problems go at the end.
        callers: how many, each with a connection of its own.
        pause: seconds between an answer and the caller's next call.
        calls_per_connection: how many before a caller connects anew; None for never.
        credentials: for TLS.
    """
    seen, over = Load(), threading.Event()

    async def caller(number: int) -> None:
        turn = number * 37
        while not over.is_set():
            channel = _channel(target, credentials)
            async with channel:
                detect: Any = channel.unary_unary(frames.DETECT, response_deserializer=pb.DetectResponse.FromString)
                for _ in range(calls_per_connection or 1_000_000_000):
                    if over.is_set():
                        return
                    turn += 1
                    await _call(detect, known, turn % len(known.raw), seen)
                    await asyncio.sleep(pause)

    async def all_callers() -> None:
        await asyncio.gather(*(caller(number) for number in range(callers)))

    def thread() -> None:
        try:
            asyncio.run(all_callers())
        except Exception as error:
            seen.problems.append(f"{type(error).__name__}: {error}")

    worker = threading.Thread(target=thread, name="load")
    worker.start()
    try:
        yield seen
    finally:
        over.set()
        worker.join()
        slowest = max(seen.latencies, default=float("inf"))
        # A case may have several loads, one after the other.
        calls = int(outcome.figures.get("calls beside it", 0)) + len(seen.latencies)
        most = max(slowest * 1000, float(outcome.figures.get("slowest of them, ms", 0.0)))
        outcome.figures |= {"calls beside it": calls, "slowest of them, ms": most}
        outcome.problems += [f"beside it: {problem}" for problem in seen.problems[:_SHOWN_PROBLEMS]]
        outcome.expect(slowest < PATIENCE_SECONDS, f"a caller beside it waited {slowest:.1f} s")


async def _call(detect: Any, known: Known, index: int, seen: Load) -> None:
    request = pb.DetectRequest(images=[known.raw[index]]).SerializeToString()
    begun = time.perf_counter()
    try:
        response = await detect(request, timeout=_TIMEOUT_SECONDS)
    except grpc.aio.AioRpcError as error:
        seen.problems.append(f"{error.code().name}: {error.details()}")
        await asyncio.sleep(0.1)
        return
    seen.latencies.append(time.perf_counter() - begun)
    if problem := known.problem(response.results[0], index):
        seen.problems.append(problem)


def _channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=OPTIONS)
    return grpc.aio.secure_channel(target, credentials, options=OPTIONS)
