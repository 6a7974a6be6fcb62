"""Many callers, one model: items wait here and are run together, in one thread.

The batcher knows no model, only a callable, and no clock or thread but those that it is given. These rules keep callers
out of each other's way:

- what waits and runs is bounded, in items and in bytes; a caller who does not fit is refused before it has cost
  anything, and so is one whose deadline would pass before its items had been run;
- a batch starts as soon as the model, or one of its replicas, is free. Nobody waits for a batch to fill: while one
  batch runs, the next fills by itself, and on an idle machine waiting would only add delay;
- what would be too late even if it ran now makes room for those that would not, while there are such;
- earliest deadline first; but the item that has waited longest goes first once it has waited `max_wait_seconds`, so
  that a caller without a deadline is never passed over for ever;
- what has expired or was cancelled is dropped before it is run;
- a submission larger than a batch is split over several and answered once;
- when a batch fails its items are run one by one, so that only the poisonous one fails;
- every submission ends exactly once: with its answers, with an error, or by its caller's leaving.
"""

import asyncio
import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from service.errors import AnswerError, ExpiredError, OverloadedError, UnavailableError
from service.model_thread import ModelThread, Worker

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# How much longer than expected a wait is taken to be at admission. Under overload the queue is always as long as
# deadlines allow, so that without it every second caller who was taken would get its answer just too late; and what the
# answer needs on its way back is not in the wait.
_CAUTION = 2.0

# An item that takes no longer than this may be run on the event loop: its way to the worker and back takes as long.
_BRIEF_SECONDS = 0.001

# How much one batch more counts in the running estimate of the seconds that an item takes.
NEWEST_WEIGHT = 0.2

# In `run`: for how many seconds yet somebody waits for an answer of this batch; below 0 where nobody does any more.
seconds_wanted: ContextVar[Callable[[], float]] = ContextVar("seconds_wanted", default=lambda: math.inf)


@dataclass(slots=True, eq=False)
class _Submission(Generic[Item, Answer]):
    """One caller's items on their way; `future` ends when the last of them has an answer, or with an error."""

    items: Sequence[Item]
    deadline: float
    number: int
    arrived: float
    future: "asyncio.Future[list[Answer | BaseException]]"
    taken: int = 0
    answers: "dict[int, Answer | BaseException]" = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Batch(Generic[Item, Answer]):
    """Items that run together; which submissions they are of, the first one's place there and how many, in order."""

    started: float
    items: list[Item] = field(default_factory=list)
    shares: list[tuple[_Submission[Item, Answer], int, int]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class BatchRun(Generic[Item]):
    """One batch that has been run, for those who count.

    Attributes:
        items: what ran together.
        waits: how long each submission whose first item ran here had waited, in seconds.
        seconds: how long it ran, with the second tries of a failed batch.
        failed: items that ended with an error.
    """

    items: Sequence[Item]
    waits: Sequence[float]
    seconds: float
    failed: int


class MicroBatcher(Generic[Item, Answer]):
    """Runs the items of many callers together and gives each caller its own answers.

    All methods are for the event loop's thread; `run` is called where the worker works, or, for a single item that is
    known to be brief, on the loop itself.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Answer]],
        *,
        max_batch: int,
        max_wait_seconds: float,
        max_pending_items: int,
        max_pending_bytes: int,
        on_batch: Callable[[BatchRun[Item]], None] | None = None,
        brief: Callable[[Item], bool] | None = None,
        worker: Worker | None = None,
        lanes: int = 1,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Needs a running event loop.

        Args:
            run: gives one answer for each of 1 to `max_batch` items, in order.
            max_batch: most items in one call of `run`, at least 1.
            max_wait_seconds: how long earlier deadlines may go before the longest waiting item, at least 0.
            max_pending_items: most items admitted and not yet answered, at least 1.
            max_pending_bytes: most bytes admitted and not yet answered, at least 1.
            on_batch: told of every batch when it has been run; must not raise.
            brief: whether `run` surely ends soon for this item, so that it may be called on the event loop where the
                item is alone; None for never.
            worker: where `run` is called; None for threads of the batcher's own.
            lanes: most batches that run at once, at least 1; such a `worker` takes as many.
            clock: seconds that never go back, which deadlines are told by; None for the loop's.
        """
        self._run = run
        self._max_batch = max_batch
        self._max_wait = max_wait_seconds
        self._max_items = max_pending_items
        self._max_bytes = max_pending_bytes
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time if clock is None else clock
        self._on_batch = on_batch
        self._brief = brief
        self._numbers = itertools.count()
        self._waiting: list[_Submission[Item, Answer]] = []  # by deadline, then by arrival
        self._running: list[_Batch[Item, Answer]] = []  # the oldest first
        self._lanes = lanes
        self._wake: asyncio.Handle | None = None
        self._items = 0
        self._bytes = 0
        self._seconds = 0.0
        self._done = 0.0
        self._closed = False
        self._worker = ModelThread(lanes) if worker is None else worker

    @property
    def pending_items(self) -> int:
        """Items admitted and not yet answered."""
        return self._items

    @property
    def running_seconds(self) -> float:
        """How long the oldest of the present batches has been running; 0 while the model is idle."""
        return self._clock() - self._running[0].started if self._running else 0.0

    @contextmanager
    def admit(self, items: int, size: int, deadline: float | None = None) -> Iterator[None]:
        """Holds room for `items` items of `size` bytes together, from before they are prepared until they are answered.

        Args:
            items: how many items will be submitted, at most.
            size: the bytes that they will hold in memory.
            deadline: by the batcher's clock; None for none.

        Raises:
            OverloadedError: there is no room, or the deadline would pass before the items had been run.
            UnavailableError: the batcher is closed.
        """
        if self._closed:
            raise UnavailableError("the server is stopping")
        if self._items + items > self._max_items:
            raise OverloadedError(
                f"expected room for {items} more images, got {self._items} of at most {self._max_items} waiting",
                self._retry_after(),
                "images",
            )
        if self._bytes + size > self._max_bytes:
            raise OverloadedError(
                f"expected room for {size} more bytes, got {self._bytes} of at most {self._max_bytes} waiting",
                self._retry_after(),
                "bytes",
            )
        if deadline is not None:
            left, wait = deadline - self._clock(), _CAUTION * self._expected_wait(items, deadline)
            if 0 < left < wait:
                raise OverloadedError(
                    f"expected a deadline of more than {wait:.3f} s, the wait at present, got {left:.3f} s",
                    self._retry_after(),
                    "deadline",
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
            deadline: by the batcher's clock; None for none.

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
            self._clock(),
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
        """Ends all submissions with UnavailableError, refuses new ones and lets the worker end; safe to call twice."""
        self._closed = True
        running = [submission for batch in self._running for submission, _, _ in batch.shares]
        for submission in [*self._waiting, *running]:
            _fail(submission, UnavailableError("the server is stopping"))
        self._waiting.clear()
        self._worker.close()

    def _wake_up(self) -> None:
        # Not at once but when the loop has seen what else is there: callers who come together run together.
        if len(self._running) < self._lanes and self._wake is None and self._waiting:
            self._wake = self._loop.call_soon(self._start)

    def _start(self) -> None:
        self._wake = None
        while len(self._running) < self._lanes and (batch := self._next_batch()) is not None:
            self._running.append(batch)
            if self._may_run_here(batch):
                self._finish(batch, self._answers(batch.items))
            else:
                self._worker.start(partial(self._run_batch, batch), partial(self._finish, batch))

    def _may_run_here(self, batch: _Batch[Item, Answer]) -> bool:
        """Whether nobody notices that the event loop stands still meanwhile."""
        return (
            self._brief is not None
            and len(batch.items) == 1
            and not self._waiting
            and 0.0 < self._seconds_per_item() <= _BRIEF_SECONDS
            and self._brief(batch.items[0])
        )

    def _next_batch(self) -> _Batch[Item, Answer] | None:
        now = self._clock()
        while self._waiting and self._waiting[0].deadline <= now:
            _fail(self._waiting.pop(0), ExpiredError("the deadline passed while the images were waiting"))
        # A caller who was cancelled in this very turn of the loop has not had the time to leave.
        self._waiting = [submission for submission in self._waiting if not submission.future.done()]
        # The last one that waits always gets its chance: without a run there would be no news of how long one takes.
        while len(self._waiting) > 1 and self._would_be_late(self._waiting[0], now):
            _fail(self._waiting.pop(0), ExpiredError("the deadline would have passed before the images had been run"))
        batch: _Batch[Item, Answer] = _Batch(now)
        oldest = min(self._waiting, key=_arrival, default=None)
        if oldest is not None and now - oldest.arrived >= self._max_wait:
            self._take(oldest, batch)
        while self._waiting and len(batch.items) < self._max_batch:
            self._take(self._waiting[0], batch)
        return batch if batch.items else None

    def _would_be_late(self, submission: _Submission[Item, Answer], now: float) -> bool:
        """Whether its deadline would pass even if the rest of its items ran now."""
        left = len(submission.items) - submission.taken
        return now + left * self._seconds_per_item() / self._lanes >= submission.deadline

    def _take(self, submission: _Submission[Item, Answer], batch: _Batch[Item, Answer]) -> None:
        start = submission.taken
        if not start:
            batch.waits.append(batch.started - submission.arrived)
        submission.taken = min(len(submission.items), start + self._max_batch - len(batch.items))
        batch.items.extend(submission.items[start : submission.taken])
        batch.shares.append((submission, start, submission.taken - start))
        if submission.taken == len(submission.items):
            self._waiting.remove(submission)

    def _finish(self, batch: _Batch[Item, Answer], answers: "list[Answer | BaseException]") -> None:
        self._running.remove(batch)
        keep, seconds = 1 - NEWEST_WEIGHT, self._clock() - batch.started
        self._seconds = keep * self._seconds + NEWEST_WEIGHT * seconds
        self._done = keep * self._done + NEWEST_WEIGHT * len(batch.items)
        # Straight away: the loop has already seen everything that came while the batch ran.
        if self._waiting and self._wake is None:
            self._start()
        position = 0
        for submission, start, share in batch.shares:
            # By their places: of two batches that run at once either may be done first.
            submission.answers.update(
                zip(range(start, start + share), answers[position : position + share], strict=True)
            )
            position += share
            if len(submission.answers) == len(submission.items) and not submission.future.done():
                submission.future.set_result([submission.answers[place] for place in range(len(submission.items))])
        if self._on_batch is not None:
            failed = sum(isinstance(answer, BaseException) for answer in answers)
            # Behind the callers, who have just been woken: they need not wait for those who count.
            self._loop.call_soon(self._on_batch, BatchRun(batch.items, batch.waits, seconds, failed))

    def _expected_wait(self, items: int, deadline: float) -> float:
        """Seconds until `items` with `deadline` would have been run: the time of what goes before them, and their own.

        On an idle model it is 0 whatever was measured: the next caller always gets its chance, so that one slow batch
        cannot shut out all who come after it.
        """
        if len(self._running) < self._lanes and not self._waiting:
            return 0.0
        before = sum(len(other.items) - other.taken for other in self._waiting if other.deadline <= deadline)
        wait = (before + items) * self._seconds_per_item() / self._lanes
        if len(self._running) == self._lanes:
            oldest = self._running[0]
            wait += max(0.0, len(oldest.items) * self._seconds_per_item() - self.running_seconds)
        return wait

    def _seconds_per_item(self) -> float:
        return self._seconds / self._done if self._done else 0.0

    def _retry_after(self) -> float:
        """Half the time that all admitted items should take, within [0.01 s, 5 s]."""
        return min(5.0, max(0.01, self._items * self._seconds_per_item() / 2))

    def _run_batch(self, batch: _Batch[Item, Answer]) -> "list[Answer | BaseException]":
        seconds_wanted.set(partial(self._seconds_wanted, batch))
        return self._answers(batch.items)

    def _seconds_wanted(self, batch: _Batch[Item, Answer]) -> float:
        waiting = [submission.deadline for submission, _, _ in batch.shares if not submission.future.done()]
        return max(waiting, default=-math.inf) - self._clock()

    def _answers(self, items: Sequence[Item]) -> "list[Answer | BaseException]":
        try:
            answers: list[Answer | BaseException] = list(self._run(items))
            if len(answers) != len(items):
                raise AnswerError(f"expected {len(items)} answers from the model, got {len(answers)}")
            return answers
        # Whatever it is, the worker must go on: without it every caller would wait for ever.
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
