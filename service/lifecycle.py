"""Whether calls are taken, and how many are on their way: what lets a server stop without losing one."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import UnavailableError


class Lifecycle:
    """Warming up, then open, then closed; counts the calls that were taken. For the event loop's thread only."""

    def __init__(self) -> None:
        """Starts as warming up."""
        self._refusal: str | None = "the model is warming up, try again"
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = asyncio.Event()

    @property
    def opened(self) -> bool:
        """Whether calls are taken now."""
        return self._refusal is None

    def open(self) -> None:
        """Calls are taken from now on."""
        self._refusal = None

    def close(self) -> None:
        """New calls are refused from now on; those that were taken go on."""
        self._refusal = "the server is stopping, try again"
        self._closed.set()

    async def closing(self) -> UnavailableError:
        """Returns when new calls are refused from now on, with what those are told: for calls that would go on."""
        await self._closed.wait()
        return UnavailableError(self._refusal)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Counts one call for as long as it takes.

        Raises:
            UnavailableError: calls are not taken now.
        """
        if self._refusal is not None:
            raise UnavailableError(self._refusal)
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def idle(self) -> None:
        """Returns when no call is on its way."""
        await self._idle.wait()
