"""What breaks inside: the model raises, hangs, wants all memory; the process is killed, or asked to stop under load."""

import asyncio
import itertools
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from pathguard.client import Client, ClientError
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from tests.service.fakes import request_for
from torture import fake_server
from torture.known import Known, known_of
from torture.report import Outcome, outcome_of
from torture.servers import OPTIONS, ServerProcess, fake, of_bundle, ready, server

CALLERS = 16
# Room for starting again: torch alone takes seconds to load.
RESTART_SECONDS = 120.0
INTERNAL: int = grpc.StatusCode.INTERNAL.value[0]


def model_fails_case() -> list[Outcome]:
    """The model raises, ends its thread, wants more memory than there is; then it hangs."""
    outcomes = []
    with server(fake(), {"PATHGUARD_STALL_SECONDS": "1", "PATHGUARD_MAX_BATCH": "32"}) as one:
        for name, value in (
            ("exception in the model", fake_server.RAISES),
            ("out of memory in the model", fake_server.TAKES_ALL_MEMORY),
            ("the model ends its thread", fake_server.ENDS_THE_THREAD),
        ):
            with outcome_of(name) as outcome:
                asyncio.run(_poison(one, value, outcome))
            outcomes.append(outcome)
        with outcome_of("the model hangs") as outcome:
            asyncio.run(_hang(one, outcome))
        outcomes.append(outcome)
    return outcomes


async def _poison(one: ServerProcess, value: int, outcome: Outcome) -> None:
    """Many callers at once, one image of each tenth call is poison: that image fails, and nothing else."""
    async with grpc.aio.insecure_channel(one.target, options=OPTIONS) as channel:
        stub: Any = DetectionServiceStub(channel)
        wanted = [[(7 * number + place) % 200 for place in range(8)] for number in range(100)]
        for number in range(0, len(wanted), 10):
            wanted[number][3] = value
        responses = await asyncio.gather(*(stub.Detect(request_for(*values), timeout=20) for values in wanted))
        failed = 0
        for values, response in zip(wanted, responses, strict=True):
            for number, result in zip(values, response.results, strict=True):
                if number == value:
                    failed += 1
                    outcome.expect(result.status.code == INTERNAL, f"the bad image got status {result.status.code}")
                    outcome.expect(fake_server.SECRET not in result.status.message, "the error's text left the server")
                else:
                    outcome.expect(result.score == number, f"{number} was answered {result.score}, {result.status}")
        outcome.figures |= {"images": 8 * len(wanted), "of them bad": failed}
        del outcome.problems[5:]
        try:
            await stub.Detect(request_for(value), timeout=20)
            outcome.problems.append("a call of a bad image alone was answered")
        except grpc.aio.AioRpcError as error:
            outcome.expect(error.code() is grpc.StatusCode.INTERNAL, f"alone it got {error.code().name}")
            outcome.expect(fake_server.SECRET not in str(error.details()), "the error's text left the server")
    outcome.expect(ready(one.target), "the server is not ready afterwards")


async def _hang(one: ServerProcess, outcome: Outcome) -> None:
    """While the model hangs callers are told in time and health says so; afterwards all is as before."""
    async with grpc.aio.insecure_channel(one.target, options=OPTIONS) as channel:
        stub: Any = DetectionServiceStub(channel)
        hanging = asyncio.ensure_future(stub.Detect(request_for(fake_server.HANGS), timeout=30))
        await asyncio.sleep(0.2)
        begun = time.perf_counter()
        waiting = [asyncio.ensure_future(stub.Detect(request_for(number), timeout=1.0)) for number in range(50)]
        endings: Counter[str] = Counter()
        for call in waiting:
            try:
                await call
                endings["answered"] += 1
            except grpc.aio.AioRpcError as error:
                endings[error.code().name] += 1
        took = time.perf_counter() - begun
        outcome.figures |= dict(endings) | {"seconds until all were told": took}
        outcome.expect(took < 2.0, f"callers with 1 s were told after {took:.2f} s")
        told = {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
        outcome.expect(set(endings) <= told, f"callers were told {dict(endings)}")
        await asyncio.sleep(max(0.0, 1.8 - took))
        outcome.expect(not await asyncio.to_thread(ready, one.target), "health says SERVING while the model hangs")
        await hanging
        for _ in range(50):
            if await asyncio.to_thread(ready, one.target):
                break
            await asyncio.sleep(0.1)
        else:
            outcome.problems.append("health does not say SERVING after the hang")
        answer = await stub.Detect(request_for(5), timeout=10)
        outcome.expect(answer.results[0].score == 5, "a wrong answer after the hang")


def killed_case(bundle: Path, kills: int) -> Outcome:
    """SIGKILL, `kills` times, with callers on the shipped retry policy: each call is answered, by the next process."""
    known = known_of(bundle, 64)
    name = f"kill -9, {kills} times; clients with the shipped retries wait for a server"
    with outcome_of(name) as outcome, server(of_bundle(bundle)) as one:
        over = threading.Event()
        counts, problems = [0] * CALLERS, []

        def caller(number: int) -> None:
            with Client(one.target, wait_for_ready=True) as client:
                for turn in itertools.count():
                    if over.is_set():
                        return
                    index = (17 * number + turn) % len(known.raw)
                    problem = _asked(client, known, index)
                    if problem:
                        problems.append(problem)
                    counts[number] += 1

        callers = [threading.Thread(target=caller, args=(number,)) for number in range(CALLERS)]
        for thread in callers:
            thread.start()
        try:
            for _ in range(kills):
                time.sleep(2)
                one.kill()
                one.start()
                outcome.figures["seconds until it was back"] = one.wait_until_ready()
                _wait_for_answers(counts, outcome)
        finally:
            over.set()
            for thread in callers:
                thread.join()
        outcome.figures |= {"clients": CALLERS, "calls": sum(counts), "failed": len(problems)}
        outcome.problems += problems[:5]
    return outcome


def _asked(client: Client, known: Known, index: int) -> str | None:
    """What was wrong with one call of the client; None if nothing."""
    file = known.encoded[index].encoded
    try:
        (result,) = client.detect([file], timeout_seconds=RESTART_SECONDS)
    except ClientError as error:
        return f"{type(error).__name__}: {error}"
    if result.error is not None or result.label != known.labels[index] or result.score is None:
        return f"image {index}: {result.error or 'a wrong answer'}"
    return None if abs(result.score - known.scores[index]) < 1e-3 else f"image {index}: a wrong score"


def _wait_for_answers(counts: list[int], outcome: Outcome) -> None:
    """Each caller gets two more answers: the one that it waited for, and another one."""
    wanted = [count + 2 for count in counts]
    ends = time.perf_counter() + RESTART_SECONDS
    while any(count < least for count, least in zip(counts, wanted, strict=True)):
        if time.perf_counter() > ends:
            outcome.problems.append("a client got no answer from the process that was started again")
            return
        time.sleep(0.05)


def stopped_case(stops: int) -> Outcome:
    """SIGTERM under load: calls that were taken are answered, the others told to go elsewhere; the process ends."""
    with outcome_of(f"SIGTERM under load, {stops} times") as outcome:
        endings: Counter[str] = Counter()
        slowest = 0.0
        for _ in range(stops):
            with server(fake(), {"PATHGUARD_MAX_BATCH": "8"}) as one:
                stopping = asyncio.run(_stopped(one, endings, outcome))
                slowest = max(slowest, stopping)
        outcome.figures |= dict(endings) | {"slowest stop, s": slowest}
        outcome.expect(endings["answered"] > 0, "expected answers before the stop")
        outcome.expect(endings["told to go elsewhere"] > 0, "expected refusals after the stop")
    return outcome


async def _stopped(one: ServerProcess, endings: "Counter[str]", outcome: Outcome) -> float:
    async def caller(number: int) -> None:
        options = [*OPTIONS, ("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(one.target, options=options) as channel:
            stub: Any = DetectionServiceStub(channel)
            for turn in itertools.count():
                values = [(number + turn + place) % 200 for place in range(4)]
                try:
                    response = await stub.Detect(request_for(*values), timeout=30)
                except grpc.aio.AioRpcError as error:
                    if _is_refusal(error):
                        endings["told to go elsewhere"] += 1
                    else:
                        endings["lost"] += 1
                        outcome.problems.append(f"{error.code().name}: {error.details()}")
                    return
                endings["answered"] += 1
                outcome.expect([result.score for result in response.results] == values, "a wrong answer")

    callers = [asyncio.ensure_future(caller(number)) for number in range(CALLERS)]
    await asyncio.sleep(1.0)
    begun = time.perf_counter()
    code = await asyncio.to_thread(one.end)
    took = time.perf_counter() - begun
    await asyncio.gather(*callers)
    outcome.expect(code == 0, f"the process ended with {code}: {one.tail()}")
    return took


def _is_refusal(error: grpc.aio.AioRpcError) -> bool:
    """Whether the call was never taken: our own words, or nobody listens any more."""
    text = error.details() or ""
    return error.code() is grpc.StatusCode.UNAVAILABLE and ("stopping" in text or "onnect" in text)
