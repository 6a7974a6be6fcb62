"""Loads a running server and measures it: with a number of callers, or at a rate.

In a closed loop each of N callers sends its next call when it has the last answer: it shows what the server can do. In
an open loop calls are sent evenly at a rate, whether answers have come or not, as many independent users would: it
shows how long they wait. There a call counts from when it should have been sent, so that a slow server cannot hide its
delay by holding up the sender.

How long: a number of calls, or a time, or until the figures are steady. Steady means that the last three windows agree:
calls per second and median latency of each are within the tolerance (10 % unless told) of the mean of the three. Then
these three are what is reported. If they never agree, the last three are reported as not steady.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio
import numpy as np

from pathguard.client.connection import NO_ACCESS, SERVICE, Access
from pathguard.client.errors import InputError, TimedOutError, error_of
from pathguard.client.requests import MAX_IMAGES_PER_CALL, MAX_MESSAGE_BYTES, ImageInput, Options, split
from protos.pathguard.v1 import detection_pb2 as pb

DETECT: Final = f"/{SERVICE}/Detect"

AGREEING_WINDOWS: Final = 3

# Calls of an open loop that may be under way; what would go beyond is counted as an error, so that a server that is too
# slow does not fill this machine's memory.
_MOST_UNDER_WAY = 5000
_MOST_REQUESTS = 64

# When enough has been measured: how long calls under way may still take, and how long gRPC takes to cancel the others.
_LAST_CALLS_SECONDS = 2.0
_CANCELLED_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """When figures are steady enough.

    Attributes:
        window_seconds: length of a window, above 0.
        tolerance: how far a window may be from the mean of three, as a share of it, above 0.
        most_windows: when to give up, at least 3.
    """

    window_seconds: float = 2.0
    tolerance: float = 0.1
    most_windows: int = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load measured.

    Attributes:
        concurrency: calls under way at once; None in an open loop.
        rate: calls sent each second; None in a closed loop.
        images_per_call: images in each call.
        calls: calls that were answered.
        images: images that were answered with a verdict.
        errors: calls that failed, and images that came back with an error.
        seconds: how long was measured.
        calls_per_second: `calls / seconds`.
        images_per_second: `images / seconds`.
        p50_milliseconds: half of the answered calls were at least as fast; likewise the next two.
        p90_milliseconds: see above.
        p99_milliseconds: see above.
        steady: whether three windows agreed; None where that was not asked for.
        windows: windows that were measured; 0 where that was not asked for.
    """

    concurrency: int | None
    rate: float | None
    images_per_call: int
    calls: int
    images: int
    errors: int
    seconds: float
    calls_per_second: float
    images_per_second: float
    p50_milliseconds: float
    p90_milliseconds: float
    p99_milliseconds: float
    steady: bool | None
    windows: int


@dataclass(slots=True)
class Window:
    """What was seen in some time.

    Attributes:
        seconds: how long.
        latencies: seconds of each call that was answered.
        images: images that were answered with a verdict.
        errors: calls that failed, and images that came back with an error.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    images: int = 0
    errors: int = 0

    def figures(self) -> tuple[float, float]:
        """Calls per second, and median latency in seconds."""
        return len(self.latencies) / self.seconds, float(np.median(self.latencies))


def measure_load(
    target: str,
    images: Sequence[ImageInput],
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    images_per_call: int = 1,
    calls: int | None = None,
    duration_seconds: float | None = None,
    steady: Steady | None = None,
    timeout_seconds: float = 30.0,
    access: Access = NO_ACCESS,
) -> LoadReport:
    """Sends `images` in turn, over and over, until `calls` are done, `duration_seconds` are over, or all is `steady`.

    Args:
        target: the server's `HOST:PORT`.
        images: at least one; files are read before the clock starts.
        concurrency: calls under way at once, at least 1; None for 1, or for a rate.
        rate: calls sent each second, above 0; None for a closed loop.
        images_per_call: 1 to 1,024.
        calls: how many calls; None for as many as there is time for.
        duration_seconds: how long to start new calls.
        steady: measure until windows agree; not together with the two above.
        timeout_seconds: longest time for each call.
        access: encryption, and who is calling.

    Raises:
        InputError: no image, an unreadable file, or a number out of range.
        ClientError: not a single call was answered; says why the last one was not.
    """
    _check(images, concurrency, rate, images_per_call, calls, duration_seconds, steady)
    sender = _Sender(target, _requests(images, images_per_call), timeout_seconds, access)
    if rate is None:
        concurrency = concurrency or 1
    length = _Length(calls, duration_seconds, steady)
    windows, is_steady = asyncio.run(_measure(sender, concurrency, rate, length))
    last = windows[-AGREEING_WINDOWS:]
    latencies = [latency for window in last for latency in window.latencies]
    if not latencies:
        raise sender.why_not()
    seconds, answered = sum(window.seconds for window in last), sum(window.images for window in last)
    p50, p90, p99 = (float(value) for value in np.percentile(np.array(latencies) * 1000, (50, 90, 99)))
    return LoadReport(
        concurrency=concurrency,
        rate=rate,
        images_per_call=images_per_call,
        calls=len(latencies),
        images=answered,
        errors=sum(window.errors for window in last),
        seconds=seconds,
        calls_per_second=len(latencies) / seconds,
        images_per_second=answered / seconds,
        p50_milliseconds=p50,
        p90_milliseconds=p90,
        p99_milliseconds=p99,
        steady=is_steady,
        windows=0 if is_steady is None else len(windows),
    )


def agree(windows: Sequence[Window], tolerance: float) -> bool:
    """Whether the last three windows are within `tolerance` of their mean, in calls per second and median latency."""
    last = windows[-AGREEING_WINDOWS:]
    if len(last) < AGREEING_WINDOWS or not all(window.latencies for window in last):
        return False
    figures = np.array([window.figures() for window in last])
    mean = figures.mean(axis=0)
    return bool((np.abs(figures - mean) <= tolerance * mean).all())


@dataclass(frozen=True, slots=True)
class _Length:
    """How long a load goes on: one or both of the first two, or the last; and in any case until it is over."""

    calls: int | None
    seconds: float | None
    steady: Steady | None
    over: threading.Event = field(default_factory=threading.Event)


class _Sender:
    """Sends calls over one connection and remembers what came of them."""

    def __init__(self, target: str, requests: Sequence[bytes], timeout_seconds: float, access: Access) -> None:
        self._target = target
        self._requests = itertools.cycle(requests)
        self._timeout = timeout_seconds
        self._access = access
        self._last_error: grpc.RpcError | None = None
        self._detect: Any = None
        self._window = Window()
        self._began = 0.0

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Has a connection inside; the clock starts."""
        options = [
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ]
        credentials = self._access.credentials(self._target)
        channel = (
            grpc.aio.insecure_channel(self._target, options=options)
            if credentials is None
            else grpc.aio.secure_channel(self._target, credentials, options=options)
        )
        async with channel:
            # Requests are bytes already, so that the load costs this machine as little as possible.
            self._detect = channel.unary_unary(DETECT, response_deserializer=pb.DetectResponse.FromString)
            self._began = time.perf_counter()
            yield

    async def call(self, due: float) -> None:
        """One call; its latency counts from `due`, by `time.perf_counter`."""
        try:
            response = await self._detect(
                next(self._requests), timeout=self._timeout, metadata=self._access.metadata or None
            )
        except grpc.RpcError as error:
            self._window.errors += 1
            self._last_error = error
            return
        self._window.latencies.append(time.perf_counter() - due)
        bad = sum(result.status.code != 0 for result in response.results)
        self._window.errors += bad
        self._window.images += len(response.results) - bad

    def refuse(self) -> None:
        """Counts a call that is not even sent."""
        self._window.errors += 1

    def window(self) -> Window:
        """What has been seen since the last time, or since the clock started."""
        now, seen = time.perf_counter(), self._window
        seen.seconds, self._began, self._window = now - self._began, now, Window()
        return seen

    def why_not(self) -> Exception:
        """Why there was no answer."""
        if self._last_error is None:
            return TimedOutError(f"no answer from {self._target} in the time that was measured")
        return error_of(self._last_error, self._target, self._timeout)


async def _measure(
    sender: _Sender, concurrency: int | None, rate: float | None, length: _Length
) -> tuple[list[Window], bool | None]:
    """The windows that were seen, and whether the last ones agree."""
    async with sender.connected():
        load = asyncio.create_task(
            _open_loop(sender, rate, length) if rate is not None else _closed_loop(sender, concurrency or 1, length)
        )
        try:
            if length.steady is None:
                await load
                return [sender.window()], None
            windows: list[Window] = []
            while len(windows) < length.steady.most_windows:
                await asyncio.wait([load], timeout=length.steady.window_seconds)
                if load.done():
                    load.result()
                windows.append(sender.window())
                if agree(windows, length.steady.tolerance):
                    return windows, True
            return windows, False
        finally:
            length.over.set()
            # Calls under way may end: one that is cancelled can come back to a loop that is gone.
            await asyncio.wait([load], timeout=_LAST_CALLS_SECONDS)
            if load.cancel():
                await asyncio.gather(load, return_exceptions=True)
                await asyncio.sleep(_CANCELLED_SECONDS)


async def _closed_loop(sender: _Sender, concurrency: int, length: _Length) -> None:
    more = _turns(length)

    async def caller() -> None:
        while more():
            await sender.call(time.perf_counter())

    async with asyncio.TaskGroup() as callers:
        for _ in range(concurrency):
            callers.create_task(caller())


async def _open_loop(sender: _Sender, rate: float, length: _Length) -> None:
    more, began = _turns(length), time.perf_counter()
    under_way: set[asyncio.Task[None]] = set()
    try:
        for number in itertools.count():
            due = began + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            elif number % 100 == 0:
                await asyncio.sleep(0)  # far behind: answers must be read all the same
            if not more():
                break
            if len(under_way) >= _MOST_UNDER_WAY:
                sender.refuse()
                continue
            task = asyncio.create_task(sender.call(due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)
    finally:
        for task in under_way:
            task.cancel()


def _turns(length: _Length) -> Callable[[], bool]:
    """Whether one call more shall be sent, each time it is asked; one at least."""
    left = itertools.count() if length.calls is None else iter(range(length.calls))
    ends = float("inf") if length.seconds is None else time.perf_counter() + length.seconds
    first = iter((True,))

    def more() -> bool:
        in_time = next(first, False) or time.perf_counter() < ends
        return in_time and not length.over.is_set() and next(left, None) is not None

    return more


def _requests(images: Sequence[ImageInput], images_per_call: int) -> list[bytes]:
    """Serialised calls in which every image stands equally often, up to a number that memory holds."""
    messages: list[pb.Image] = []
    for part in split(images, MAX_MESSAGE_BYTES):
        if problem := next((problem for problem in part.problems if problem), None):
            raise InputError(problem)
        messages += part.messages
    calls = len(messages) // np.gcd(len(messages), images_per_call)
    turn = itertools.cycle(messages)
    return [
        Options().request(list(itertools.islice(turn, images_per_call))).SerializeToString()
        for _ in range(min(calls, _MOST_REQUESTS))
    ]


def _check(
    images: Sequence[ImageInput],
    concurrency: int | None,
    rate: float | None,
    images_per_call: int,
    calls: int | None,
    duration_seconds: float | None,
    steady: Steady | None,
) -> None:
    if not len(images):
        raise InputError("expected at least one image, got none")
    if concurrency is not None and rate is not None:
        raise InputError("expected a concurrency or a rate, got both")
    if concurrency is not None and concurrency < 1:
        raise InputError(f"expected a concurrency of at least 1, got {concurrency}")
    if rate is not None and not 0 < rate < float("inf"):
        raise InputError(f"expected a rate above 0 calls per second, got {rate:g}")
    if not 1 <= images_per_call <= MAX_IMAGES_PER_CALL:
        raise InputError(f"expected 1 to {MAX_IMAGES_PER_CALL} images in a call, got {images_per_call}")
    if calls is None and duration_seconds is None and steady is None:
        raise InputError("expected a number of calls, a duration or steady windows, got none of them")
    if steady is not None and not (calls is None and duration_seconds is None):
        raise InputError("expected steady windows, or a number of calls or a duration, got both")
    if calls is not None and calls < 1:
        raise InputError(f"expected at least 1 call, got {calls}")
    if duration_seconds is not None and not duration_seconds > 0:
        raise InputError(f"expected a duration above 0 s, got {duration_seconds}")
    if steady is not None and not (
        steady.window_seconds > 0 and steady.tolerance > 0 and steady.most_windows >= AGREEING_WINDOWS
    ):
        raise InputError(
            f"expected windows and a tolerance above 0 and at least {AGREEING_WINDOWS} windows, got "
            f"{steady.window_seconds:g} s, {steady.tolerance:g} and {steady.most_windows}"
        )
