"""Clients that no library would be: slow, silent, half gone, or lying about what they send. Others are not disturbed.

Beside each case a well-behaved caller goes on calling; its answers have to be right, and in time.
"""

import contextlib
import io
import time
import zlib
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from detector.memory import KEPT_BYTES
from protos.pathguard.v1 import detection_pb2 as pb
from torture import frames
from torture.known import known_of
from torture.load import load
from torture.report import Outcome, outcome_of
from torture.servers import MESSAGE_BYTES, ServerProcess, channel_to, of_bundle, ready, server

# What the server keeps of freed memory on purpose, and one message.
GROWTH_MEGABYTES = (KEPT_BYTES + MESSAGE_BYTES) / 1e6
# How many megabytes a bomb unpacks to: the most that a message may have, and far beyond it.
BOMBS_MEGABYTES = (63, 64, 1024, 60_000)
BOMB_PIXELS = 20_000
TOO_MANY_IMAGES = 10_000
NONSENSE_CONNECTIONS = 300
DEADLY_CALLS = 10


def wire_cases(bundle: Path, seconds: float) -> list[Outcome]:
    """All of them against one server with `bundle`; the slow ones hold on for `seconds`."""
    known = known_of(bundle, 64)
    outcomes = []
    with server(of_bundle(bundle)) as one:
        with channel_to(one.target) as channel:
            # What the first large message takes is kept by the allocator, and is no growth.
            _detect_of(channel)(pb.DetectRequest(images=[pb.Image(encoded=bytes(60_000_000))]), timeout=30)
        for name, case in (
            ("half-open connections", _half_open),
            ("slow writers", _slow_writers),
            ("slow readers", _slow_readers),
            ("gzip bombs", _gzip_bombs),
            ("decompression-bomb images", _image_bombs),
            (f"{TOO_MANY_IMAGES} images in a call", _too_many_images),
            ("nonsense on the wire", _nonsense),
            ("calls that would end gRPC's own server", _deadly),
        ):
            with outcome_of(name) as outcome:
                before = one.resident_megabytes()
                with load(one.target, known, outcome):
                    case(one, seconds, outcome)
                time.sleep(0.5)
                grown = one.resident_megabytes() - before
                outcome.figures["memory grown, MB"] = grown
                outcome.expect(grown < GROWTH_MEGABYTES, f"memory grew by {grown:.0f} MB")
            outcome.expect(ready(one.target, seconds=5), f"the server is not ready afterwards: {one.tail()}")
            outcomes.append(outcome)
            if not ready(one.target, seconds=5):
                one.kill()
                one.start()
                one.wait_until_ready()
    return outcomes


def _half_open(one: ServerProcess, seconds: float, outcome: Outcome) -> None:
    """Connections that say nothing, or stop in the middle of a preface, a head, a message."""
    whole = frames.PREFACE + frames.settings() + frames.call(1, bytes(10_000))
    parts = [b"", frames.PREFACE[:9], frames.PREFACE, whole[:60], whole[: len(whole) // 2], whole[:-1]]
    with contextlib.ExitStack() as stack:
        for number in range(120):
            connection = stack.enter_context(contextlib.closing(frames.connect(one.target)))
            connection.sendall(parts[number % len(parts)])
        outcome.figures["connections"] = 120
        time.sleep(seconds)
        outcome.figures["descriptors of the server"] = one.descriptors()
    ends = time.perf_counter() + 10
    while one.descriptors() > 60 and time.perf_counter() < ends:
        time.sleep(0.1)
    outcome.expect(one.descriptors() <= 60, f"{one.descriptors()} descriptors are still open")


def _slow_writers(one: ServerProcess, seconds: float, outcome: Outcome) -> None:
    """Whole calls, but a byte at a time."""
    whole = frames.PREFACE + frames.settings() + frames.call(1, bytes(2_000))
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(contextlib.closing(frames.connect(one.target))) for _ in range(50)]
        ends, sent = time.perf_counter() + seconds, 0
        while time.perf_counter() < ends:
            for connection in connections:
                connection.sendall(whole[sent : sent + 1])
            sent += 1
            time.sleep(0.02)
        outcome.figures |= {"connections": len(connections), "bytes of each": sent}


def _slow_readers(one: ServerProcess, seconds: float, outcome: Outcome) -> None:
    """Calls whose answers are never taken: the server keeps them, and they must not be more than what was admitted."""
    with channel_to(one.target) as channel:
        models: Any = channel.unary_unary(
            "/pathguard.v1.DetectionService/ListModels", response_deserializer=pb.ListModelsResponse.FromString
        )
        spec = models(b"", timeout=10).models[0].input
    pixels = np.zeros((spec.height, spec.width, spec.channels), dtype=np.uint8)
    raw = pb.RawPixels(pixels=pixels.tobytes(), height=spec.height, width=spec.width, channels=spec.channels)
    request = pb.DetectRequest(images=[pb.Image(raw=raw)] * 2, include_path=True).SerializeToString()
    asked = 0
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(10):
            connection = stack.enter_context(contextlib.closing(frames.connect(one.target)))
            connection.sendall(frames.PREFACE + frames.settings(window=0))
            connection.settimeout(0.2)
            connections.append(connection)
        ends = time.perf_counter() + seconds
        stream = 1
        while time.perf_counter() < ends:
            for connection in connections:
                # The client's own flow control is ignored as well: what the server does not take, it may drop.
                with contextlib.suppress(OSError):
                    connection.sendall(frames.call(stream, request))
                    asked += 1
            stream += 2
            time.sleep(0.05)
        outcome.figures |= {"connections": len(connections), "calls": asked}
        outcome.expect(asked > 0, "expected calls to be taken")


def _gzip_bombs(one: ServerProcess, seconds: float, outcome: Outcome) -> None:
    """Small messages that unpack to as much as a message may have, and to far more."""
    del seconds
    for megabytes in BOMBS_MEGABYTES:
        body = frames.message(frames.gzip_of_zeros(megabytes), compressed=True)
        peak = one.peak_megabytes()
        with contextlib.closing(frames.connect(one.target, seconds=30)) as connection:
            said = frames.exchange(connection, frames.headers(1, encoding="gzip"), body)
        outcome.expect(b"grpc-status" in said, f"a bomb of {megabytes} MB was not refused: {said[-200:]!r}")
        rise = one.peak_megabytes() - peak
        outcome.figures[f"rise of the peak, {megabytes} MB bomb, MB"] = rise
        outcome.expect(rise < 2.5 * min(megabytes, 64) + 50, f"a bomb of {megabytes} MB took {rise:.0f} MB")


def _image_bombs(one: ServerProcess, seconds: float, outcome: Outcome) -> None:
    """Small files with millions of pixels, cut files, files that lie about their size: each has its own status."""
    del seconds
    large = _file_of(BOMB_PIXELS, BOMB_PIXELS)
    lying = large.replace(_size_in_png(BOMB_PIXELS, BOMB_PIXELS), _size_in_png(16, 16))
    files = [large, lying, large[: len(large) // 2], _text_bomb(), _file_of(4000, 4000)]
    outcome.figures |= {"files": len(files), "largest file, kB": max(map(len, files)) / 1e3}
    with channel_to(one.target) as channel:
        request = pb.DetectRequest(images=[pb.Image(encoded=file) for file in files * 4])
        response = _detect_of(channel)(request, timeout=60)
    codes = {result.status.code for result in response.results}
    outcome.expect(codes == {grpc.StatusCode.INVALID_ARGUMENT.value[0]}, f"expected each to be refused, got {codes}")


def _too_many_images(one: ServerProcess, seconds: float, outcome: Outcome) -> None:
    """A call of 10,000 images is refused at once, over and over."""
    del seconds
    request = pb.DetectRequest(images=[pb.Image(encoded=b"x" * 100)] * TOO_MANY_IMAGES)
    slowest = 0.0
    with channel_to(one.target) as channel:
        for _ in range(20):
            begun = time.perf_counter()
            try:
                _detect_of(channel)(request, timeout=10)
                outcome.problems.append("the call was taken")
            except grpc.RpcError as error:
                code = error.code()
                outcome.expect(code is grpc.StatusCode.INVALID_ARGUMENT, f"it was refused as {code.name}")
            slowest = max(slowest, time.perf_counter() - begun)
    outcome.figures |= {"calls": 20, "slowest refusal, ms": slowest * 1000}


def _nonsense(one: ServerProcess, seconds: float, outcome: Outcome) -> None:
    """Bytes that are no HTTP/2, no head, no message, or none of ours."""
    del seconds
    random = np.random.default_rng(0)
    start = frames.PREFACE + frames.settings()
    whole = start + frames.call(1, bytes(500))
    for number in range(NONSENSE_CONNECTIONS):
        kind = number % 4
        if kind == 0:
            content = random.bytes(int(random.integers(1, 2000)))
        elif kind == 1:
            content = start + random.bytes(int(random.integers(1, 2000)))
        elif kind == 2:
            content = start + frames.call(1, random.bytes(int(random.integers(1, 2000))))
        else:
            damaged = bytearray(whole)
            for place in random.integers(len(frames.PREFACE), len(whole), 5):
                damaged[place] = int(random.integers(256))
            content = bytes(damaged)
        connection = frames.connect(one.target)
        with contextlib.suppress(OSError):
            connection.sendall(content)
        if number % 2:
            frames.abort(connection)
        else:
            connection.close()
    outcome.figures["connections"] = NONSENSE_CONNECTIONS
    with channel_to(one.target) as channel:
        plain: Any = channel.unary_unary(frames.DETECT)
        try:
            plain(b"\xff\xff\xff", timeout=10)
            outcome.problems.append("what is no request was answered")
        except grpc.RpcError as error:
            text = f"{error.code().name}: {error.details()}"
            outcome.expect(text.startswith("INVALID_ARGUMENT") and "class" not in text, f"no request: {text}")


def _deadly(one: ServerProcess, seconds: float, outcome: Outcome) -> None:
    """A path that is no text would end grpc.aio's own loop: here it ends nothing, and no other caller notices."""
    del seconds
    for _ in range(DEADLY_CALLS):
        with contextlib.closing(frames.connect(one.target)) as connection:
            head = frames.headers(1, b"\xe8" + frames.DETECT.encode())
            said = frames.exchange(connection, head, b"")
        outcome.expect(b"grpc-status" in said, f"expected to be told that there is no such method, got {said[-200:]!r}")
    restarts = int(one.metric("pathguard_server_restarts_total"))
    outcome.figures |= {"calls": DEADLY_CALLS, "restarts": restarts}
    outcome.expect(restarts == 0, f"gRPC ended its server {restarts} times")


def _detect_of(channel: grpc.Channel) -> Any:
    return channel.unary_unary(
        frames.DETECT,
        request_serializer=pb.DetectRequest.SerializeToString,
        response_deserializer=pb.DetectResponse.FromString,
    )


def _file_of(height: int, width: int) -> bytes:
    """A black PNG: a thousandth of the size of its pixels."""
    file = io.BytesIO()
    with Image.new("L", (width, height)) as image:
        image.save(file, "PNG", compress_level=9)
    return file.getvalue()


def _size_in_png(height: int, width: int) -> bytes:
    return width.to_bytes(4, "big") + height.to_bytes(4, "big")


def _text_bomb() -> bytes:
    """A small PNG whose text unpacks to a hundred megabytes."""
    small = _file_of(16, 16)
    content = b"Comment\x00\x00" + zlib.compress(bytes(100_000_000), 9)
    chunk = b"zTXt" + content
    end_of_head = 8 + 25
    block = len(content).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return small[:end_of_head] + block + small[end_of_head:]
