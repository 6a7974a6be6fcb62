"""Work that may be late or left out, in one thread beside the event loop, bounded in jobs and in bytes."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Final

from service.processors import anywhere

_log = logging.getLogger(__name__)

MOST_JOBS: Final = 1000
MOST_BYTES: Final = 64 * 1024 * 1024
_CLOSE_SECONDS: Final = 2.0


class Background:
    """Runs jobs in turn."""

    def __init__(self, name: str) -> None:
        """Starts the thread, a daemon of that name."""
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._held = 0
        self._thread = threading.Thread(target=anywhere(self._work), name=name, daemon=True)
        self._thread.start()

    def offer(self, job: Callable[[], None], held: int) -> bool:
        """Takes a job that keeps `held` bytes in memory until it has run; False where there is no room for it."""
        with self._lock:
            if self._waiting >= MOST_JOBS or (self._held and self._held + held > MOST_BYTES):
                return False
            self._waiting += 1
            self._held += held
        self._jobs.put((job, held))
        return True

    def close(self) -> None:
        """Runs what waits, for some seconds, and ends."""
        self._jobs.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _work(self) -> None:
        while (taken := self._jobs.get()) is not None:
            job, held = taken
            try:
                job()
            except Exception:
                # Whatever it is, the next job runs.
                _log.exception("a job in the background failed")
            del job
            with self._lock:
                self._waiting -= 1
                self._held -= held
