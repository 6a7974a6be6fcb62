"""Blocking work beside the event loop that can neither hold the loop up nor keep the process alive."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from service.processors import anywhere

Result = TypeVar("Result")


async def in_thread(work: Callable[[], Result], seconds: float) -> Result:
    """What `work` gives in a thread of its own.

    Where it takes longer than `seconds` it is left to itself; its thread is a daemon, so that what hangs there, on a
    disk that is away for example, does not keep the process from ending.

    Raises:
        TimeoutError: `seconds` were over.
        Exception: whatever `work` raised.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def end(result: Result | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as error:
            failed = error
        with suppress(RuntimeError):  # the loop has been closed: nobody waits
            loop.call_soon_threadsafe(end, result, failed)

    threading.Thread(target=anywhere(run), name="aside", daemon=True).start()
    async with asyncio.timeout(seconds):
        return await done
