"""A closed-loop load for a running server: each of N callers sends its next call when it has the last answer."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np

from pathguard.client.errors import InputError, error_of
from pathguard.client.requests import MAX_IMAGES_PER_CALL, MAX_MESSAGE_BYTES, ImageInput, Options, split
from protos.pathguard.v1 import detection_pb2 as pb

DETECT = "/pathguard.v1.DetectionService/Detect"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load measured.

    Attributes:
        calls: calls that were answered.
        images: images that were answered with a verdict.
        errors: calls that failed, and images that came back with an error.
        seconds: from the first call to the last answer.
        images_per_second: `images / seconds`.
        p50_milliseconds: half of the answered calls were at least as fast; likewise the next two.
        p90_milliseconds: see above.
        p99_milliseconds: see above.
    """

    calls: int
    images: int
    errors: int
    seconds: float
    images_per_second: float
    p50_milliseconds: float
    p90_milliseconds: float
    p99_milliseconds: float


@dataclass(slots=True)
class _Tally:
    """What the callers have seen so far; `left` is handed out call by call."""

    left: Iterator[int]
    ends: float
    latencies: list[float] = field(default_factory=list)
    images: int = 0
    errors: int = 0
    last_error: grpc.RpcError | None = None


def measure_load(
    target: str,
    images: Sequence[ImageInput],
    *,
    concurrency: int = 1,
    images_per_call: int = 1,
    calls: int | None = None,
    duration_seconds: float | None = None,
    timeout_seconds: float = 30.0,
) -> LoadReport:
    """Sends `images` in turn, over and over, until `calls` are done or `duration_seconds` are over.

    Args:
        target: the server's `HOST:PORT`.
        images: at least one; files are read before the clock starts.
        concurrency: calls under way at once, at least 1.
        images_per_call: 1 to 1,024.
        calls: how many calls; None for as many as fit into `duration_seconds`.
        duration_seconds: how long to start new calls; None for until `calls` are done.
        timeout_seconds: longest time for each call.

    Raises:
        InputError: no image, an unreadable file, or a number out of range.
        ClientError: not a single call was answered; says why the last one was not.
    """
    _check(images, concurrency, images_per_call, calls, duration_seconds)
    requests = _requests(images, images_per_call)
    return asyncio.run(_load(target, requests, concurrency, calls, duration_seconds, timeout_seconds))


async def _load(
    target: str,
    requests: Sequence[bytes],
    concurrency: int,
    calls: int | None,
    duration_seconds: float | None,
    timeout_seconds: float,
) -> LoadReport:
    options = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        # Requests are bytes already, so that the load costs this machine as little as possible.
        detect: Any = channel.unary_unary(DETECT, response_deserializer=pb.DetectResponse.FromString)
        started = time.perf_counter()
        tally = _Tally(
            left=iter(itertools.count() if calls is None else range(calls)),
            ends=float("inf") if duration_seconds is None else started + duration_seconds,
        )
        await asyncio.gather(*(_caller(detect, requests, tally, timeout_seconds) for _ in range(concurrency)))
        seconds = time.perf_counter() - started
    if not tally.latencies:
        assert tally.last_error is not None
        raise error_of(tally.last_error, target, timeout_seconds)
    p50, p90, p99 = (float(value) for value in np.percentile(np.array(tally.latencies) * 1000, (50, 90, 99)))
    return LoadReport(
        calls=len(tally.latencies),
        images=tally.images,
        errors=tally.errors,
        seconds=seconds,
        images_per_second=tally.images / seconds,
        p50_milliseconds=p50,
        p90_milliseconds=p90,
        p99_milliseconds=p99,
    )


async def _caller(detect: Any, requests: Sequence[bytes], tally: _Tally, timeout_seconds: float) -> None:
    for number in tally.left:
        begin = time.perf_counter()
        try:
            response = await detect(requests[number % len(requests)], timeout=timeout_seconds)
        except grpc.RpcError as error:
            tally.errors += 1
            tally.last_error = error
        else:
            tally.latencies.append(time.perf_counter() - begin)
            bad = sum(result.status.code != 0 for result in response.results)
            tally.errors += bad
            tally.images += len(response.results) - bad
        if time.perf_counter() >= tally.ends:
            return


def _requests(images: Sequence[ImageInput], images_per_call: int) -> list[bytes]:
    """Serialised calls in which every image stands equally often."""
    messages: list[pb.Image] = []
    for part in split(images, MAX_MESSAGE_BYTES):
        if problem := next((problem for problem in part.problems if problem), None):
            raise InputError(problem)
        messages += part.messages
    calls = len(messages) // np.gcd(len(messages), images_per_call)
    turn = itertools.cycle(messages)
    return [
        Options().request(list(itertools.islice(turn, images_per_call))).SerializeToString()
        for _ in range(min(calls, 64))
    ]


def _check(
    images: Sequence[ImageInput],
    concurrency: int,
    images_per_call: int,
    calls: int | None,
    duration_seconds: float | None,
) -> None:
    if not len(images):
        raise InputError("expected at least one image, got none")
    if concurrency < 1:
        raise InputError(f"expected a concurrency of at least 1, got {concurrency}")
    if not 1 <= images_per_call <= MAX_IMAGES_PER_CALL:
        raise InputError(f"expected 1 to {MAX_IMAGES_PER_CALL} images in a call, got {images_per_call}")
    if calls is None and duration_seconds is None:
        raise InputError("expected a number of calls or a duration, got neither")
    if calls is not None and calls < 1:
        raise InputError(f"expected at least 1 call, got {calls}")
    if duration_seconds is not None and not duration_seconds > 0:
        raise InputError(f"expected a duration above 0 s, got {duration_seconds}")
