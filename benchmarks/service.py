"""What serving costs: the time that `Detect` adds to the forward pass, and the memory of the server process.

The server is a process of its own with one torch thread, as is this one. A forward pass here, an empty call and a
`Detect` there take turns, so that all find caches equally cold and whatever else the machine does weighs on all alike;
images are noise of the network's size, seed 0. The empty call tells what gRPC and the machine's way of waking a
sleeping process cost by themselves.

    python -m benchmarks.service --bundle DIR [--quick] [--json FILE]
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import torch

from benchmarks.report import Row, print_rows, write_rows
from benchmarks.server import server_process
from detector.bundle import Bundle
from detector.images import decode, encode_png
from detector.scoring import Detector
from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub

ADDED_P50_BAR_MILLISECONDS = 1.5
MEMORY_BAR_MEGABYTES = 700.0
MEMORY_CALLS = 2000
WARM_UP_TURNS = 50


def measure(bundle: Path, quick: bool) -> list[Row]:
    """Starts a server with `bundle` and measures it; `quick` takes fewer turns and leaves out the memory after load."""
    torch.set_num_threads(1)
    detector = Detector(Bundle(bundle))
    spec = detector.spec
    pixels = np.random.default_rng(0).integers(0, 256, (spec.height, spec.width, spec.channels), dtype=np.uint8)
    file = encode_png(pixels)
    raw_image = pb.RawPixels(pixels=pixels.tobytes(), height=spec.height, width=spec.width, channels=spec.channels)
    raw = pb.DetectRequest(images=[pb.Image(raw=raw_image)])
    encoded = pb.DetectRequest(images=[pb.Image(encoded=file)])
    turns = 200 if quick else 2000
    with server_process(bundle, threads=1) as (process, target), grpc.insecure_channel(target) as channel:
        at_start = resident_megabytes(process.pid)
        stub = DetectionServiceStub(channel)
        bare, transport, served = medians(
            turns,
            lambda: detector.detect(pixels[None]),
            lambda: stub.GetModel(pb.GetModelRequest()),
            lambda: answered(stub.Detect(raw)),
        )
        bare_file, served_file = medians(
            turns,
            lambda: detector.detect(np.stack([decode(file, spec).pixels])),
            lambda: answered(stub.Detect(encoded)),
        )
        for _ in range(0 if quick else MEMORY_CALLS):
            answered(stub.Detect(encoded))
        after = None if quick else resident_megabytes(process.pid)
    added, memory = ADDED_P50_BAR_MILLISECONDS, MEMORY_BAR_MEGABYTES
    return [
        Row(figure="forward pass with verdict, p50, ms", value=bare),
        Row(figure="empty call (GetModel), p50, ms", value=transport),
        Row(figure="added p50 of Detect, 1 caller, raw pixels, ms", value=served - bare, bar=added),
        Row(figure="the same, PNG file, decoded on both sides, ms", value=served_file - bare_file, bar=added),
        Row(figure="memory of the server after its start, MB", value=at_start, bar=memory),
        Row(figure=f"memory after {MEMORY_CALLS} calls more, MB", value=after, bar=memory),
    ]


def medians(turns: int, *functions: Callable[[], object]) -> list[float]:
    """The median milliseconds of each function, called one after the other, in turn."""
    taken: list[list[float]] = [[] for _ in functions]
    for turn in range(WARM_UP_TURNS + turns):
        for function, times in zip(functions, taken, strict=True):
            begin = time.perf_counter()
            function()
            if turn >= WARM_UP_TURNS:
                times.append(time.perf_counter() - begin)
    return [float(np.median(times)) * 1000 for times in taken]


def answered(response: pb.DetectResponse) -> None:
    """Fails unless all images have an answer: a refusal would be a very fast call."""
    bad = [result.status.message for result in response.results if result.status.code]
    if bad:
        raise SystemExit(f"expected answers for all images, got: {bad[0]}")


def resident_megabytes(pid: int) -> float | None:
    """Resident memory of a process in 10^6 bytes; None where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 / 1e6 if match else None


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="folder of a bundle with a detector")
    parser.add_argument("--quick", action="store_true", help="fewer turns, no memory after load")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    given = parser.parse_args()
    rows = measure(given.bundle, given.quick)
    print_rows("service", rows)
    if given.json:
        write_rows(given.json, rows)


if __name__ == "__main__":
    main()
