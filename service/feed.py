"""A stream of requests, answered side by side: a bounded number under way, each answer as soon as it is ready."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, Generic, TypeVar

Request = TypeVar("Request")
Response = TypeVar("Response")


async def answer_all(
    requests: AsyncIterator[Request],
    answer: Callable[[Request], Coroutine[Any, Any, Response]],
    *,
    size: Callable[[Request], int],
    limit: int,
    end: Callable[[], Coroutine[Any, Any, Exception]],
) -> AsyncGenerator[Response, None]:
    """The answers to `requests`, in the order in which they are ready.

    Reads on only while requests of together less than `limit` are under way, with those whose answers nobody has taken
    yet, so that a caller who does not read is not read from. When a request fails, or `end` comes, nothing more is
    read; what is under way is answered, and then the error is raised.

    Args:
        requests: what comes in.
        answer: answers one request.
        size: how much one request counts; at least 1 is counted.
        limit: how much may be under way, at least 1; a larger request waits until nothing else is.
        end: comes, with the error to raise, when no more shall be read.

    Raises:
        Exception: what `answer` or `requests` raised first, or what `end` gave.
    """
    feed = _Feed(requests, answer, size, limit, end)
    try:
        while (response := await feed.next()) is not None:
            yield response
        if feed.error is not None:
            raise feed.error
    finally:
        feed.cancel()


class _Feed(Generic[Request, Response]):
    """The tasks of one stream."""

    def __init__(
        self,
        requests: AsyncIterator[Request],
        answer: Callable[[Request], Coroutine[Any, Any, Response]],
        size: Callable[[Request], int],
        limit: int,
        end: Callable[[], Coroutine[Any, Any, Exception]],
    ) -> None:
        self.error: Exception | None = None
        self._answer = answer
        self._size = size
        self._limit = limit
        self._under_way = 0
        self._taken = 0  # what the answer that was taken last had counted
        self._room = asyncio.Event()
        self._ready: asyncio.Queue[tuple[int, Response] | None] = asyncio.Queue()
        self._answering: set[asyncio.Task[None]] = set()
        self._reading = asyncio.create_task(self._read(requests))
        self._ending = asyncio.create_task(self._end(end))

    async def next(self) -> Response | None:
        """The next answer; None when there will be no more."""
        self._leave(self._taken)
        ready = await self._ready.get()
        if ready is None:
            return None
        self._taken, response = ready
        return response

    def cancel(self) -> None:
        """Ends everything that is still going on."""
        for task in (self._reading, self._ending, *self._answering):
            task.cancel()

    async def _read(self, requests: AsyncIterator[Request]) -> None:
        try:
            async for request in requests:
                count = max(1, self._size(request))
                while self._under_way and self._under_way + count > self._limit:
                    self._room.clear()
                    await self._room.wait()
                if self.error is not None:
                    return
                self._under_way += count
                task = asyncio.create_task(self._answer_one(request, count))
                self._answering.add(task)
                task.add_done_callback(self._answered)
        except Exception as error:
            self._stop(error)
        finally:
            if not self._answering:
                self._ready.put_nowait(None)

    async def _answer_one(self, request: Request, count: int) -> None:
        try:
            self._ready.put_nowait((count, await self._answer(request)))
        except Exception as error:
            self._leave(count)
            self._stop(error)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        if not self._answering and (self._reading.done() or self.error is not None):
            self._ready.put_nowait(None)

    async def _end(self, end: Callable[[], Coroutine[Any, Any, Exception]]) -> None:
        self._stop(await end())

    def _stop(self, error: Exception) -> None:
        """Reads no more; the first error is the one that counts."""
        self.error = self.error or error
        self._reading.cancel()

    def _leave(self, count: int) -> None:
        self._under_way -= count
        self._room.set()
