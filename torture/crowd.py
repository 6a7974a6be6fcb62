"""Many clients at once who cancel, run out of time and vanish; every answer is compared with the known one."""

import asyncio
import random
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import grpc
import grpc.aio
import numpy as np

from protos.inference import grpc_service_pb2 as inference
from protos.pathguard.v1 import detection_pb2 as pb
from torture import frames
from torture.fuzz import INFER
from torture.known import BAD_FILE, Known, known_of
from torture.report import Outcome, outcome_of
from torture.servers import HOST, OPTIONS, ServerProcess, of_bundle, server

CLIENTS = 200
RUDE_SHARE = 0.1
IMAGES_PER_CALL = (1, 1, 1, 2, 4, 8, 16, 32)
DEADLINES = (0.02, 0.1, 0.5, 2.0, 10.0)
INFERENCE_SHARE = 0.3
CANCELLED_SHARE = 0.15
HUNG_UP_SHARE = 0.03
BAD_IMAGE_SHARE = 0.05
PREPARED_CALLS = 400
# Later than the client's own loop was late by this much: an answer after its deadline.
LATE_SECONDS = 0.05
GROWTH_MEGABYTES = 200.0

# What a call may end with besides an answer: its own doing, or a refusal.
_ALLOWED = {
    grpc.StatusCode.CANCELLED: "cancelled",
    grpc.StatusCode.DEADLINE_EXCEEDED: "out of time",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "refused",
}


@dataclass(frozen=True, slots=True)
class _Call:
    """A prepared request: its method, and the known images in it, None for one that is no image."""

    method: str
    request: bytes
    images: Sequence[int | None]


@dataclass(slots=True)
class _Tally:
    """What all clients together have seen."""

    ends: float
    endings: "Counter[str]" = field(default_factory=Counter)
    images: int = 0
    latest: float = 0.0
    lag: float = 0.0
    problems: list[str] = field(default_factory=list)


def crowd_case(bundle: Path, seconds: float, clients: int = CLIENTS) -> Outcome:
    """`clients` for `seconds` on a server with `bundle`."""
    known = known_of(bundle)
    name = f"{clients} clients: cancel, run out of time, vanish"
    with outcome_of(name) as outcome, server(of_bundle(bundle)) as one:
        before = one.resident_megabytes()
        tally = asyncio.run(_crowd(one, known, clients, seconds))
        _judge(outcome, tally, one, before)
        asyncio.run(_one_more(one, known, outcome))
    return outcome


def _judge(outcome: Outcome, tally: _Tally, one: ServerProcess, before: float) -> None:
    outcome.figures |= {name: tally.endings[name] for name in sorted(tally.endings)}
    outcome.figures["images answered"] = tally.images
    outcome.figures["latest after its deadline, ms"] = max(0.0, tally.latest * 1000)
    outcome.figures["lag of the clients' own loop, ms"] = tally.lag * 1000
    outcome.problems += tally.problems[:5]
    outcome.expect(tally.endings["answered"] > 0, "expected answers, got none")
    allowed = tally.lag + LATE_SECONDS
    outcome.expect(tally.latest <= allowed, f"an answer {tally.latest:.3f} s after its deadline, {allowed:.3f} allowed")
    outcome.expect(one.alive(), f"the server ended: {one.tail()}")
    # Every call that came in has ended, once, and nothing of it is left.
    ends = time.perf_counter() + 10
    while one.metric("pathguard_queue_images") and time.perf_counter() < ends:
        time.sleep(0.1)
    left = one.metric("pathguard_queue_images")
    outcome.expect(left == 0, f"{left:.0f} images are still taken in and not answered")
    started, handled = (
        sum(one.metric(f"grpc_server_{what}_total", grpc_method=method) for method in ("Detect", "ModelInfer"))
        for what in ("started", "handled")
    )
    outcome.figures["calls at the server"] = int(started)
    outcome.expect(started == handled, f"{started:.0f} calls began at the server, {handled:.0f} ended")
    grown = one.resident_megabytes() - before
    outcome.figures["memory grown, MB"] = grown
    outcome.expect(grown < GROWTH_MEGABYTES, f"memory grew by {grown:.0f} MB")


async def _crowd(one: ServerProcess, known: Known, clients: int, seconds: float) -> _Tally:
    chance = random.Random(0)
    calls = [_prepared(known, chance) for _ in range(PREPARED_CALLS)]
    tally = _Tally(time.perf_counter() + seconds)
    rude = max(1, int(clients * RUDE_SHARE))
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch_lag(tally))
        for number in range(clients):
            who = _rude_client(one.port, calls, tally, random.Random(number)) if number < rude else None
            group.create_task(who or _client(one.target, known, calls, tally, random.Random(number)))
    return tally


async def _one_more(one: ServerProcess, known: Known, outcome: Outcome) -> None:
    """After all that, a plain call is answered."""
    async with grpc.aio.insecure_channel(one.target, options=OPTIONS) as channel:
        detect = _detect_of(channel)
        response = await detect(pb.DetectRequest(images=known.raw[:32]).SerializeToString(), timeout=10)
    wrong = [problem for index, result in enumerate(response.results) if (problem := known.problem(result, index))]
    outcome.expect(len(response.results) == 32 and not wrong, f"afterwards: {wrong[:1]}")


def _prepared(known: Known, chance: random.Random) -> _Call:
    images: list[int | None] = [chance.randrange(len(known.raw)) for _ in range(chance.choice(IMAGES_PER_CALL))]
    messages = [(known.raw if chance.random() < 0.7 else known.encoded)[index or 0] for index in images]
    if chance.random() < BAD_IMAGE_SHARE:
        place = chance.randrange(len(images))
        images[place], messages[place] = None, pb.Image(encoded=BAD_FILE)
    if chance.random() < INFERENCE_SHARE:
        files = [
            message.encoded or known.encoded[index or 0].encoded
            for index, message in zip(images, messages, strict=True)
        ]
        return _Call(INFER, _infer_request(files), images)
    return _Call(frames.DETECT, pb.DetectRequest(images=messages).SerializeToString(), images)


def _infer_request(files: Sequence[bytes]) -> bytes:
    """The same in the other protocol: files in one BYTES tensor."""
    tensor = inference.ModelInferRequest.InferInputTensor(name="IMAGE_BYTES", datatype="BYTES", shape=[len(files)])
    blob = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    return inference.ModelInferRequest(inputs=[tensor], raw_input_contents=[blob]).SerializeToString()


async def _client(target: str, known: Known, calls: Sequence[_Call], tally: _Tally, chance: random.Random) -> None:
    channel = grpc.aio.insecure_channel(target, options=OPTIONS)
    try:
        while time.perf_counter() < tally.ends:
            call, seconds = chance.choice(calls), chance.choice(DEADLINES)
            behaviour = chance.random()
            begun = time.perf_counter()
            method: Any = channel.unary_unary(call.method)
            under_way = method(call.request, timeout=seconds)
            if behaviour < CANCELLED_SHARE:
                asyncio.get_running_loop().call_later(chance.uniform(0, 0.1), under_way.cancel)
            elif behaviour < CANCELLED_SHARE + HUNG_UP_SHARE:
                await asyncio.sleep(chance.uniform(0, 0.05))
                await channel.close()
                channel = grpc.aio.insecure_channel(target, options=OPTIONS)
                tally.endings["hung up"] += 1
            try:
                response = await under_way
            except grpc.aio.AioRpcError as error:
                _failed(tally, call, error)
            except (asyncio.CancelledError, grpc.aio.UsageError):
                tally.endings["cancelled"] += 1
            else:
                tally.latest = max(tally.latest, time.perf_counter() - begun - seconds)
                _answered(tally, known, call, response)
            # A refusal comes at once: who tries again at once only heats the machine.
            await asyncio.sleep(chance.uniform(0, 0.02))
    finally:
        await channel.close()


async def _rude_client(port: int, calls: Sequence[_Call], tally: _Tally, chance: random.Random) -> None:
    """Sends a call, or the first part of it, and tears the connection down without a word."""
    while time.perf_counter() < tally.ends:
        reader, writer = await asyncio.open_connection(HOST, port)
        whole = frames.PREFACE + frames.settings() + frames.call(1, chance.choice(calls).request)
        writer.write(whole if chance.random() < 0.5 else whole[: chance.randrange(30, len(whole))])
        await asyncio.sleep(chance.uniform(0, 0.05))
        writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        del reader
        tally.endings["torn down"] += 1
        await asyncio.sleep(chance.uniform(0, 0.1))


def _failed(tally: _Tally, call: _Call, error: grpc.aio.AioRpcError) -> None:
    ending = _ALLOWED.get(error.code())
    # The other protocol has no place for the status of one image: without a good one, the call is refused.
    if call.method == INFER and not any(index is not None for index in call.images):
        ending = ending or ("refused" if error.code() is grpc.StatusCode.INVALID_ARGUMENT else None)
    tally.endings[ending or f"ended with {error.code().name}"] += 1
    if ending is None:
        tally.problems.append(f"{error.code().name}: {error.details()}")


def _answered(tally: _Tally, known: Known, call: _Call, content: bytes) -> None:
    tally.endings["answered"] += 1
    tally.images += sum(index is not None for index in call.images)
    tally.problems += (
        _infer_problems(known, call, content) if call.method == INFER else _detect_problems(known, call, content)
    )


def _detect_problems(known: Known, call: _Call, content: bytes) -> list[str]:
    """What is wrong with an answer of ours."""
    results = pb.DetectResponse.FromString(content).results
    if len(results) != len(call.images):
        return [f"{len(call.images)} images were sent, {len(results)} answered"]
    problems = []
    for index, result in zip(call.images, results, strict=True):
        if index is not None:
            problems.append(known.problem(result, index))
        elif result.status.code != grpc.StatusCode.INVALID_ARGUMENT.value[0]:
            problems.append(f"what is no image was answered with status {result.status.code}")
    return [problem for problem in problems if problem]


def _infer_problems(known: Known, call: _Call, content: bytes) -> list[str]:
    """What is wrong with an answer of the other protocol."""
    response = inference.ModelInferResponse.FromString(content)
    raw = {output.name: blob for output, blob in zip(response.outputs, response.raw_output_contents, strict=True)}
    labels, scores = np.frombuffer(raw["LABEL"], "<i8"), np.frombuffer(raw["ADV_SCORE"], "<f8")
    if not len(labels) == len(scores) == len(call.images):
        return [f"{len(call.images)} images were sent, {len(labels)} answered"]
    return [
        f"image {index}: the answer of another image, by the other protocol"
        for index, label, score in zip(call.images, labels, scores, strict=True)
        if (label != -1 if index is None else label != known.labels[index] or abs(score - known.scores[index]) > 1e-3)
    ]


async def _watch_lag(tally: _Tally) -> None:
    while time.perf_counter() < tally.ends:
        begun = time.perf_counter()
        await asyncio.sleep(0.01)
        tally.lag = max(tally.lag, time.perf_counter() - begun - 0.01)


def _detect_of(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(frames.DETECT, response_deserializer=pb.DetectResponse.FromString)
