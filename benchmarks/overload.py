"""More calls than a server can answer, sent evenly whether answers have come or not, each with a deadline."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

_OPTIONS = (("grpc.max_send_message_length", 64 * 1024 * 1024),)
# How much later than its deadline an answer may seem to come, because this process was busy.
_SLACK_SECONDS = 0.01


@dataclass(slots=True)
class Overload:
    """What became of the calls.

    Attributes:
        refusals: seconds until each refusal.
        answers: seconds until each answer.
        late: calls that were taken and not answered by their deadline.
        other: calls that ended otherwise, by status.
    """

    refusals: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)
    late: int = 0
    other: dict[str, int] = field(default_factory=dict)


async def overload(
    target: str, method: str, body: bytes, *, calls_per_second: float, seconds: float, deadline: float
) -> Overload:
    """Sends `body` at a rate, each with `deadline` seconds to go."""
    seen = Overload()
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        call: Any = channel.unary_unary(method)

        async def one() -> None:
            begun = time.perf_counter()
            try:
                await call(body, timeout=deadline)
            except grpc.aio.AioRpcError as error:
                took = time.perf_counter() - begun
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    seen.refusals.append(took)
                elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    seen.late += 1
                else:
                    seen.other[error.code().name] = seen.other.get(error.code().name, 0) + 1
                return
            took = time.perf_counter() - begun
            seen.answers.append(took)
            seen.late += took > deadline + _SLACK_SECONDS

        began, tasks = time.perf_counter(), set()
        for number in range(int(seconds * calls_per_second)):
            # By the clock and not by a sum of pauses: a late one does not delay those after it.
            await asyncio.sleep(max(0.0, began + number / calls_per_second - time.perf_counter()))
            task = asyncio.create_task(one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    return seen
