"""The thread in which the model runs, beside the event loop; torch lets go of Python's lock while it computes."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from service.processors import anywhere

Work = Callable[[], Any]
Done = Callable[[Any], None]


class Worker(Protocol):
    """Does work elsewhere and tells of it on the event loop: `ModelThread`, or what a test puts in its place."""

    def start(self, work: Work, done: Done) -> None:
        """Begins `work`, which must not raise; `done` is called on the loop with what it gives."""

    def close(self) -> None:
        """Takes no more work; what runs may end."""


class ModelThread:
    """Threads that each do one piece of work after the other. All methods are for the event loop's thread."""

    def __init__(self, threads: int = 1) -> None:
        """Starts them; needs a running event loop.

        Args:
            threads: one for a model in this process; as many as replicas where each waits for one of them.
        """
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._handed: queue.SimpleQueue[tuple[Work, Done] | None] = queue.SimpleQueue()
        # Daemons, so that a model that hangs cannot keep the process alive after the server has stopped.
        for _ in range(threads):
            threading.Thread(target=anywhere(self._work), name="model", daemon=True).start()

    def start(self, work: Work, done: Done) -> None:
        """As `Worker.start`."""
        self._handed.put((work, done))

    def close(self) -> None:
        """As `Worker.close`; safe to call twice."""
        for _ in range(self._threads):
            self._handed.put(None)

    def _work(self) -> None:
        while (handed := self._handed.get()) is not None:
            work, done = handed
            try:
                self._loop.call_soon_threadsafe(done, work())
            except RuntimeError:  # the loop has been closed: nobody is left to answer
                return
