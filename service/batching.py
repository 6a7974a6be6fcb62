"""Many callers, one model: items wait here and are run together, in one thread.

The batcher knows no model, only a callable. These rules keep callers out of each other's way:

- what waits and runs is bounded, in items and in bytes; a caller who does not fit is refused before it has cost
  anything, and so is one whose deadline would pass while it waits;
- a batch starts as soon as the model is free. Nobody waits for a batch to fill: while one batch runs, the next fills
  by itself, and on an idle machine waiting would only add delay;
- earliest deadline first; but the item that has waited longest goes first once it has waited `max_wait_seconds`, so
  that a caller without a deadline is never passed over for ever;
- what has expired or was cancelled is dropped before it is run;
- a submission larger than a batch is split over several and answered once;
- when a batch fails its items are run one by one, so that only the poisonous one fails.
"""

import asyncio
import bisect
import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service.errors import AnswerError, ExpiredError, OverloadedError, UnavailableError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# How much one batch more counts in the running estimate of the seconds that an item takes.
_NEWEST_WEIGHT = 0.2


@dataclass(slots=True, eq=False)
class _Submission(Generic[Item, Answer]):
    """One caller's items on their way; `future` ends when the last of them has an answer, or with an error."""

    items: Sequence[Item]
    deadline: float
    number: int
    arrived: float
    future: "asyncio.Future[list[Answer | BaseException]]"
    taken: int = 0
    answers: "list[Answer | BaseException]" = field(default_factory=list)


@dataclass(slots=True)
class _Batch(Generic[Item, Answer]):
    """Items that run together, and how many of them each submission gave, in order."""

    items: list[Item]
    shares: list[tuple[_Submission[Item, Answer], int]]
    started: float


class MicroBatcher(Generic[Item, Answer]):
    """Runs the items of many callers together and gives each caller its own answers.

    All methods are for the event loop's thread; `run` is called in a thread of the batcher's own.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Answer]],
        *,
        max_batch: int,
        max_wait_seconds: float,
        max_pending_items: int,
        max_pending_bytes: int,
    ) -> None:
        """Starts the thread; needs a running event loop.

        Args:
            run: gives one answer for each of 1 to `max_batch` items, in order.
            max_batch: most items in one call of `run`, at least 1.
            max_wait_seconds: how long earlier deadlines may go before the longest waiting item, at least 0.
            max_pending_items: most items admitted and not yet answered, at least 1.
            max_pending_bytes: most bytes admitted and not yet answered, at least 1.
        """
        self._run = run
        self._max_batch = max_batch
        self._max_wait = max_wait_seconds
        self._max_items = max_pending_items
        self._max_bytes = max_pending_bytes
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._waiting: list[_Submission[Item, Answer]] = []  # by deadline, then by arrival
        self._running: _Batch[Item, Answer] | None = None
        self._wake: asyncio.Handle | None = None
        self._items = 0
        self._bytes = 0
        self._seconds = 0.0
        self._done = 0.0
        self._closed = False
        self._handed: queue.SimpleQueue[_Batch[Item, Answer] | None] = queue.SimpleQueue()
        # A daemon, so that a model that hangs cannot keep the process alive after the server has stopped.
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def pending_items(self) -> int:
        """Items admitted and not yet answered."""
        return self._items

    @contextmanager
    def admit(self, items: int, size: int, deadline: float | None = None) -> Iterator[None]:
        """Holds room for `items` items of `size` bytes together, from before they are prepared until they are answered.

        Args:
            items: how many items will be submitted, at most.
            size: the bytes that they will hold in memory.
            deadline: by the loop's clock; None for none.

        Raises:
            OverloadedError: there is no room, or the deadline would pass while the items wait.
            UnavailableError: the batcher is closed.
        """
        if self._closed:
            raise UnavailableError("the server is stopping")
        if self._items + items > self._max_items:
            raise OverloadedError(
                f"expected room for {items} more images, got {self._items} of at most {self._max_items} waiting",
                self._retry_after(),
            )
        if self._bytes + size > self._max_bytes:
            raise OverloadedError(
                f"expected room for {size} more bytes, got {self._bytes} of at most {self._max_bytes} waiting",
                self._retry_after(),
            )
        if deadline is not None:
            left, wait = deadline - self._loop.time(), self._expected_wait(deadline)
            if 0 < left < wait:
                raise OverloadedError(
                    f"expected a deadline of more than {wait:.3f} s, the wait at present, got {left:.3f} s",
                    self._retry_after(),
                )
        self._items += items
        self._bytes += size
        try:
            yield
        finally:
            self._items -= items
            self._bytes -= size

    async def submit(self, items: Sequence[Item], deadline: float | None = None) -> "list[Answer | BaseException]":
        """The answers for `items`, in order; where an item failed even when run alone, the error in its place.

        Args:
            items: at least one; call inside `admit`.
            deadline: by the loop's clock; None for none.

        Raises:
            ExpiredError: the deadline passed before all items had been run.
            UnavailableError: the batcher was closed.
        """
        if self._closed:
            raise UnavailableError("the server is stopping")
        submission: _Submission[Item, Answer] = _Submission(
            items,
            math.inf if deadline is None else deadline,
            next(self._numbers),
            self._loop.time(),
            self._loop.create_future(),
        )
        bisect.insort(self._waiting, submission, key=_urgency)
        self._wake_up()
        try:
            return await submission.future
        finally:
            # Still waiting only if the caller was cancelled: nobody else's place changes.
            if submission.taken < len(items) and submission in self._waiting:
                self._waiting.remove(submission)

    async def close(self) -> None:
        """Ends all submissions with UnavailableError, refuses new ones and lets the thread end; safe to call twice."""
        self._closed = True
        running = [] if self._running is None else [submission for submission, _ in self._running.shares]
        for submission in [*self._waiting, *running]:
            _fail(submission, UnavailableError("the server is stopping"))
        self._waiting.clear()
        self._handed.put(None)

    def _wake_up(self) -> None:
        # Not at once but when the loop has seen what else is there: callers who come together run together.
        if self._running is None and self._wake is None and self._waiting:
            self._wake = self._loop.call_soon(self._start)

    def _start(self) -> None:
        self._wake = None
        batch = self._next_batch()
        if batch is not None:
            self._running = batch
            self._handed.put(batch)

    def _next_batch(self) -> _Batch[Item, Answer] | None:
        now = self._loop.time()
        while self._waiting and self._waiting[0].deadline <= now:
            _fail(self._waiting.pop(0), ExpiredError("the deadline passed while the images were waiting"))
        batch: _Batch[Item, Answer] = _Batch([], [], now)
        oldest = min(self._waiting, key=_arrival, default=None)
        if oldest is not None and now - oldest.arrived >= self._max_wait:
            self._take(oldest, batch)
        while self._waiting and len(batch.items) < self._max_batch:
            self._take(self._waiting[0], batch)
        return batch if batch.items else None

    def _take(self, submission: _Submission[Item, Answer], batch: _Batch[Item, Answer]) -> None:
        start = submission.taken
        submission.taken = min(len(submission.items), start + self._max_batch - len(batch.items))
        batch.items.extend(submission.items[start : submission.taken])
        batch.shares.append((submission, submission.taken - start))
        if submission.taken == len(submission.items):
            self._waiting.remove(submission)

    def _finish(self, batch: _Batch[Item, Answer], answers: "list[Answer | BaseException]") -> None:
        self._running = None
        keep = 1 - _NEWEST_WEIGHT
        self._seconds = keep * self._seconds + _NEWEST_WEIGHT * (self._loop.time() - batch.started)
        self._done = keep * self._done + _NEWEST_WEIGHT * len(batch.items)
        position = 0
        for submission, share in batch.shares:
            submission.answers += answers[position : position + share]
            position += share
            if len(submission.answers) == len(submission.items) and not submission.future.done():
                submission.future.set_result(submission.answers)
        # Straight away: the loop has already seen everything that came while the batch ran.
        if self._waiting and self._wake is None:
            self._start()

    def _expected_wait(self, deadline: float) -> float:
        """Seconds until an item with `deadline` would start: the time of what goes before it."""
        if not self._done:
            return 0.0
        seconds_per_item = self._seconds / self._done
        before = sum(len(other.items) - other.taken for other in self._waiting if other.deadline <= deadline)
        wait = before * seconds_per_item
        if self._running is not None:
            spent = self._loop.time() - self._running.started
            wait += max(0.0, len(self._running.items) * seconds_per_item - spent)
        return wait

    def _retry_after(self) -> float:
        """Half the time that all admitted items should take, within [0.01 s, 5 s]."""
        seconds_per_item = self._seconds / self._done if self._done else 0.0
        return min(5.0, max(0.01, self._items * seconds_per_item / 2))

    def _work(self) -> None:
        """The model thread: one batch after the other, until None comes."""
        while (batch := self._handed.get()) is not None:
            answers = self._answers(batch.items)
            try:
                self._loop.call_soon_threadsafe(self._finish, batch, answers)
            except RuntimeError:  # the loop has been closed: nobody is left to answer
                return

    def _answers(self, items: Sequence[Item]) -> "list[Answer | BaseException]":
        try:
            answers: list[Answer | BaseException] = list(self._run(items))
            if len(answers) != len(items):
                raise AnswerError(f"expected {len(items)} answers from the model, got {len(answers)}")
            return answers
        # Whatever it is, the thread must go on: without it every caller would wait for ever.
        except BaseException as error:
            if len(items) == 1:
                return [error]
            return [answer for item in items for answer in self._answers([item])]


def _urgency(submission: _Submission[Item, Answer]) -> tuple[float, int]:
    return submission.deadline, submission.number


def _arrival(submission: _Submission[Item, Answer]) -> int:
    return submission.number


def _fail(submission: _Submission[Item, Answer], error: Exception) -> None:
    if not submission.future.done():
        submission.future.set_exception(error)
