"""What serving costs: delay, throughput, refusals, memory; alone and beside MLServer and LitServe.

    python -m benchmarks.service --bundle DIR [--quick] [--only PART] [--json FILE]
                                 [--mlserver-python FILE] [--litserve-python FILE]

Each server is a process of its own with one torch thread, as is this one, and all serve the same network. What is
compared takes turns, so that all find caches equally cold and whatever else the machine does weighs on all alike;
images are noise of the network's size, seed 0. The empty call tells what gRPC and the machine's way of waking a
sleeping process cost by themselves. `make peers` builds the peers' environments; without them their rows stay empty.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from benchmarks.offline import offline_process
from benchmarks.overload import overload
from benchmarks.peers.sides import Side, ours, peers
from benchmarks.report import Row, print_rows, write_rows
from benchmarks.server import resident_megabytes, server_process
from benchmarks.timing import interleaved
from detector.bundle import Bundle
from detector.images import ImageSpec, Pixels, decode, encode_png
from detector.scoring.detector import Detector
from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub

ADDED_P50_BAR_MILLISECONDS = 0.6
THROUGHPUT_BAR = 0.95
REFUSAL_BAR_MILLISECONDS = 5.0
MEMORY_BAR_MEGABYTES = 700.0
FLAT_BAR = 1.05
IMAGES_PER_CALL = 32
CALLERS = 4
OVERLOAD = 3.0
# Deadline under overload, in forward passes of one call.
DEADLINE_PASSES = 6.0
MEMORY_CALLS = 2_000
FLAT_CALLS = 100_000
WARM_UP_TURNS = 50
DETECT = "/pathguard.v1.DetectionService/Detect"
PEERS = ("MLServer", "LitServe")
_LOOP_CPU = {"PATHGUARD_LOOP_CPU": str(max(os.sched_getaffinity(0)))} if hasattr(os, "sched_getaffinity") else {}
PARTS = ("delay", "memory", "throughput", "overload", "peers")


def measure(
    bundle: Path,
    quick: bool,
    parts: Collection[str] = PARTS,
    mlserver_python: Path | None = None,
    litserve_python: Path | None = None,
) -> list[Row]:
    """Starts a server with `bundle` for each of `parts` and measures it; `quick` takes fewer turns and calls."""
    torch.set_num_threads(1)
    detector = Detector(Bundle(bundle))
    rows = []
    for part in parts:
        began = time.perf_counter()
        with server_process(bundle, threads=1) as (process, target):
            start = time.perf_counter() - began
            match part:
                case "delay":
                    rows.append(Row(figure="from the start to the first call, s", value=start))
                    with server_process(bundle, threads=1, settings=_LOOP_CPU) as (_, kept):
                        rows += _delay(detector, target, kept, 200 if quick else 2000)
                case "memory":
                    rows += _memory(process.pid, target, detector.spec, quick)
                case "throughput":
                    rows += _saturated(bundle, detector, target, *((5, 0.5) if quick else (15, 2.0)))
                case "overload":
                    rows += _overloaded(detector, target, 3 if quick else 20)
                case "peers":
                    with peers(bundle, mlserver_python, litserve_python) as others:
                        sides = [ours(target), *others]
                        rows += _beside(detector.spec, sides, *((2, 30, 0.5) if quick else (10, 200, 2.0)))
    return rows


def _delay(detector: Detector, target: str, kept: str, turns: int) -> list[Row]:
    """One caller: what `Detect` takes beyond the forward pass; `kept` is a server with `--loop-cpu`."""
    pixels = noise(detector.spec, 1)
    file = encode_png(pixels[0])
    raw, encoded = raw_request(pixels), pb.DetectRequest(images=[pb.Image(encoded=file)])
    with grpc.insecure_channel(target) as channel, grpc.insecure_channel(kept) as kept_channel:
        stub, kept_stub = DetectionServiceStub(channel), DetectionServiceStub(kept_channel)
        bare, transport, served, kept_transport, kept_served = medians(
            turns,
            lambda: detector.detect(pixels),
            lambda: stub.GetModel(pb.GetModelRequest()),
            lambda: answered(stub.Detect(raw)),
            lambda: kept_stub.GetModel(pb.GetModelRequest()),
            lambda: answered(kept_stub.Detect(raw)),
        )
        bare_file, served_file, kept_file = medians(
            turns,
            lambda: detector.detect(np.stack([decode(file, detector.spec).pixels])),
            lambda: answered(stub.Detect(encoded)),
            lambda: answered(kept_stub.Detect(encoded)),
        )
    added = ADDED_P50_BAR_MILLISECONDS
    return [
        Row(figure=f"forward pass with verdict by engine {detector.engine}, p50, ms", value=bare),
        Row(figure="empty call (GetModel), p50, ms", value=transport),
        Row(figure="added p50 of Detect, 1 caller, raw pixels, ms", value=served - bare, bar=added),
        Row(figure="the same, PNG file, decoded on both sides, ms", value=served_file - bare_file, bar=added),
        Row(figure="the same over an empty call, raw pixels, ms", value=served - bare - transport),
        Row(figure="with --loop-cpu: empty call, ms", value=kept_transport),
        Row(figure="with --loop-cpu: added p50 of Detect, raw pixels, ms", value=kept_served - bare, bar=added),
        Row(figure="with --loop-cpu: the same, PNG file, ms", value=kept_file - bare_file, bar=added),
    ]


def _memory(pid: int, target: str, spec: ImageSpec, quick: bool) -> list[Row]:
    """Memory after the start, after some calls, and after many."""
    at_start = resident_megabytes(pid)
    body = raw_request(noise(spec, 1)).SerializeToString()
    asyncio.run(_many(target, body, MEMORY_CALLS))
    after = resident_megabytes(pid)
    few, many = (2_000, 5_000) if quick else (FLAT_CALLS // 10, FLAT_CALLS)
    asyncio.run(_many(target, body, few - MEMORY_CALLS))
    early = resident_megabytes(pid)
    asyncio.run(_many(target, body, many - few))
    late = resident_megabytes(pid)
    ratio = None if early is None or late is None else late / early
    return [
        Row(figure="memory of the server after its start, MB", value=at_start, bar=MEMORY_BAR_MEGABYTES),
        Row(figure=f"memory after {MEMORY_CALLS} calls more, MB", value=after, bar=MEMORY_BAR_MEGABYTES),
        Row(figure=f"memory after {many} calls / after {few}", value=ratio, bar=FLAT_BAR),
    ]


async def _many(target: str, body: bytes, calls: int, callers: int = 8) -> None:
    left = iter(range(calls))

    async def caller() -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            detect: Any = channel.unary_unary(DETECT, response_deserializer=pb.DetectResponse.FromString)
            for _ in left:
                answered(await detect(body, timeout=60))

    await asyncio.gather(*(caller() for _ in range(callers)))


def _saturated(bundle: Path, detector: Detector, target: str, rounds: int, seconds: float) -> list[Row]:
    """32 images a call, several callers, against batches of 32 without a server."""
    side = ours(target)
    body = side.request(noise(detector.spec, IMAGES_PER_CALL))
    images_per_second(side, body, IMAGES_PER_CALL, CALLERS, seconds)
    with (
        offline_process(bundle, IMAGES_PER_CALL, keeps_memory=False) as plain,
        offline_process(bundle, IMAGES_PER_CALL, keeps_memory=True) as kept,
    ):
        rates = np.array(
            [
                (plain(seconds), kept(seconds), images_per_second(side, body, IMAGES_PER_CALL, CALLERS, seconds))
                for _ in range(rounds)
            ]
        )
    ratios = np.median(rates[:, 2:] / rates[:, :2], axis=0)
    what = f"{CALLERS} callers, {IMAGES_PER_CALL} images a call"
    return [
        Row(figure=f"offline, batches of {IMAGES_PER_CALL}, images per second", value=float(np.median(rates[:, 0]))),
        Row(figure="the same, keeping freed memory as the server does", value=float(np.median(rates[:, 1]))),
        Row(figure=f"served / offline, {what}", value=float(ratios[0]), bar=THROUGHPUT_BAR, at_most=False),
        Row(
            figure="served / offline that keeps freed memory, the same",
            value=float(ratios[1]),
            bar=THROUGHPUT_BAR,
            at_most=False,
        ),
    ]


def _overloaded(detector: Detector, target: str, seconds: float) -> list[Row]:
    """Three times what the server can do: refusals come at once, and what is taken keeps its deadline."""
    pixels = noise(detector.spec, IMAGES_PER_CALL)
    side = ours(target)
    body = side.request(pixels)
    capacity = images_per_second(side, body, IMAGES_PER_CALL, CALLERS, 2.0) / IMAGES_PER_CALL
    deadline = DEADLINE_PASSES / capacity
    seen = asyncio.run(
        overload(target, DETECT, body, calls_per_second=OVERLOAD * capacity, seconds=seconds, deadline=deadline)
    )
    if seen.other:
        raise SystemExit(f"expected answers and refusals under overload, got {seen.other}")
    total = len(seen.refusals) + len(seen.answers) + seen.late
    refusal = float(np.percentile(seen.refusals, 99)) * 1000 if seen.refusals else None
    taken = len(seen.answers) + seen.late
    return [
        Row(figure=f"{OVERLOAD:g}-fold overload: calls a second", value=OVERLOAD * capacity),
        Row(figure="share of them refused", value=len(seen.refusals) / max(1, total)),
        Row(figure="refusal, p50, ms", value=float(np.median(seen.refusals)) * 1000 if seen.refusals else None),
        Row(figure="refusal, p99, ms", value=refusal, bar=REFUSAL_BAR_MILLISECONDS),
        Row(
            figure=f"taken calls that missed their deadline of {deadline * 1000:.0f} ms, share",
            value=seen.late / max(1, taken),
            bar=0.0,
        ),
        Row(figure="answered under overload / without", value=len(seen.answers) / seconds / capacity),
    ]


def _beside(spec: ImageSpec, sides: Sequence[Side], rounds: int, calls: int, seconds: float) -> list[Row]:
    """Our server and its peers in turn: one image at a time, and calls of 32 images."""
    one, many = noise(spec, 1), noise(spec, IMAGES_PER_CALL)
    delays: dict[str, list[float]] = {side.name: [] for side in sides}
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(rounds + 1):
        for side in sides:
            quick_ones = _delays(side, side.request(one), calls)
            per_second = images_per_second(side, side.request(many), len(many), CALLERS, seconds)
            if turn:  # the first warms up
                delays[side.name].append(float(np.median(quick_ones)) * 1000)
                rates[side.name].append(per_second)
    rows = [
        Row(figure="Detect, 1 caller, 1 image, p50, ms", value=float(np.median(delays["pathguard"]))),
        Row(
            figure=f"Detect, {CALLERS} callers, {IMAGES_PER_CALL} images a call, images per second",
            value=float(np.median(rates["pathguard"])),
        ),
    ]
    for name in PEERS:
        there = name in delays
        delay = float(np.median(delays[name])) if there else None
        rate = float(np.median(rates[name])) if there else None
        slower = float(np.median(np.divide(delays["pathguard"], delays[name]))) if there else None
        faster = float(np.median(np.divide(rates["pathguard"], rates[name]))) if there else None
        rows += [
            Row(figure=f"{name}: p50, ms", value=delay),
            Row(figure=f"p50, ours / {name}'s", value=slower, bar=1.0),
            Row(figure=f"{name}: images per second", value=rate),
            Row(figure=f"images per second, ours / {name}'s", value=faster, bar=1.0, at_most=False),
        ]
    return rows


def _delays(side: Side, body: bytes, calls: int) -> list[float]:
    """Seconds of each call, one after the other."""
    taken = []
    with side.caller() as ask:
        for turn in range(calls + 10):
            begin = time.perf_counter()
            ask(body)
            if turn >= 10:
                taken.append(time.perf_counter() - begin)
    return taken


def images_per_second(side: Side, body: bytes, images: int, callers: int, seconds: float) -> float:
    """Images answered a second with so many callers, each with its own connection, in a closed loop."""
    began = time.perf_counter()

    def caller() -> int:
        done = 0
        with side.caller() as ask:
            while time.perf_counter() - began < seconds:
                if len(ask(body)) != images:
                    raise SystemExit(f"expected {images} answers from {side.name}")
                done += images
        return done

    with ThreadPoolExecutor(callers) as pool:
        done = sum(future.result() for future in [pool.submit(caller) for _ in range(callers)])
    return done / (time.perf_counter() - began)


def noise(spec: ImageSpec, count: int) -> Pixels:
    """`(count, height, width, channels)`, seed 0."""
    shape = (count, spec.height, spec.width, spec.channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def raw_request(pixels: Pixels) -> pb.DetectRequest:
    """A call with `pixels` as raw images."""
    _, height, width, channels = pixels.shape
    return pb.DetectRequest(
        images=[
            pb.Image(raw=pb.RawPixels(pixels=one.tobytes(), height=height, width=width, channels=channels))
            for one in pixels
        ]
    )


def medians(turns: int, *functions: Callable[[], object]) -> list[float]:
    """The median milliseconds of each function, called one after the other, in turn."""
    return [1000 * seconds for seconds in interleaved(functions, turns, WARM_UP_TURNS)]


def answered(response: pb.DetectResponse) -> None:
    """Fails unless all images have an answer: a refusal would be a very fast call."""
    bad = [result.status.message for result in response.results if result.status.code]
    if bad:
        raise SystemExit(f"expected answers for all images, got: {bad[0]}")


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="folder of a bundle with a detector")
    parser.add_argument("--quick", action="store_true", help="fewer turns and calls, under a minute")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be given again")
    parser.add_argument("--mlserver-python", type=Path, help="python of an environment with MLServer")
    parser.add_argument("--litserve-python", type=Path, help="python of an environment with LitServe")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    given = parser.parse_args()
    rows = measure(given.bundle, given.quick, given.only or PARTS, given.mlserver_python, given.litserve_python)
    print_rows("service", rows)
    if given.json:
        write_rows(given.json, rows)


if __name__ == "__main__":
    main()
