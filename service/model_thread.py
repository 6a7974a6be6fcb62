"""The one thread in which the model runs, beside the event loop; torch lets go of Python's lock while it computes."""

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
        """Begins `work`, which must not raise; `done` is called on the loop with what it gives. One at a time."""

    def close(self) -> None:
        """Takes no more work; what runs may end."""


class ModelThread:
    """A thread that does one piece of work after the other. All methods are for the event loop's thread."""

    def __init__(self) -> None:
        """Starts the thread; needs a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._handed: queue.SimpleQueue[tuple[Work, Done] | None] = queue.SimpleQueue()
        # A daemon, so that a model that hangs cannot keep the process alive after the server has stopped.
        threading.Thread(target=anywhere(self._work), name="model", daemon=True).start()

    def start(self, work: Work, done: Done) -> None:
        """As `Worker.start`."""
        self._handed.put((work, done))

    def close(self) -> None:
        """As `Worker.close`; safe to call twice."""
        self._handed.put(None)

    def _work(self) -> None:
        while (handed := self._handed.get()) is not None:
            work, done = handed
            try:
                self._loop.call_soon_threadsafe(done, work())
            except RuntimeError:  # the loop has been closed: nobody is left to answer
                return
