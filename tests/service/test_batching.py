import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from service.batching import BatchRun, MicroBatcher, seconds_wanted
from service.errors import AnswerError, ExpiredError, OverloadedError, UnavailableError

POISON = -1


class Model:
    """Answers twice the item; remembers its batches; waits while `gate` is cleared; fails on `POISON`."""

    def __init__(self):
        self.batches = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def hold(self):
        self.gate.clear()
        self.entered.clear()

    async def running(self):
        assert await asyncio.to_thread(self.entered.wait, 20)

    def __call__(self, items):
        self.batches.append(list(items))
        self.entered.set()
        self.gate.wait()
        if POISON in items:
            raise RuntimeError("poison")
        return [2 * item for item in items]


class Clock:
    """Goes only where it is put."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@asynccontextmanager
async def batching(model, **settings):
    limits = {"max_batch": 4, "max_wait_seconds": 60.0, "max_pending_items": 1000, "max_pending_bytes": 1000}
    batcher = MicroBatcher(model, **(limits | settings))
    try:
        yield batcher
    finally:
        getattr(model, "gate", threading.Event()).set()
        await batcher.close()


@asynccontextmanager
async def busy(model, batcher):
    """The model is running item 0, and runs on when the block ends."""
    model.hold()
    task = asyncio.create_task(batcher.submit([0]))
    await model.running()
    yield
    model.gate.set()
    assert await task == [0]


async def waiting(*submissions):
    """Tasks of `submissions`, all of them in the queue."""
    tasks = [asyncio.create_task(submission) for submission in submissions]
    await asyncio.sleep(0)
    return tasks


class Timed:
    """Takes `seconds` of `clock` for an item, and remembers the thread of each batch."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.threads = clock, seconds, []

    def __call__(self, items):
        self.threads.append(threading.current_thread())
        self.clock.now += self.seconds * len(items)
        return [2 * item for item in items]


async def test_a_brief_item_that_is_alone_runs_on_the_event_loop_once_it_is_known_how_long_it_takes():
    clock, here = Clock(), threading.current_thread()
    model = Timed(clock, 0.0005)
    async with batching(model, clock=clock, brief=lambda item: item < 100) as batcher:
        assert await batcher.submit([1]) == [2]
        assert await batcher.submit([1]) == [2]
        assert await batcher.submit([100]) == [200]
        assert await asyncio.gather(batcher.submit([1]), batcher.submit([2])) == [[2], [4]]
    assert [thread is here for thread in model.threads] == [False, True, False, False]


async def test_no_item_that_takes_long_runs_on_the_event_loop():
    clock, here = Clock(), threading.current_thread()
    model = Timed(clock, 0.002)
    async with batching(model, clock=clock, brief=lambda _: True) as batcher:
        for _ in range(3):
            await batcher.submit([1])
    assert here not in model.threads


async def test_what_fails_on_the_event_loop_fails_its_caller_alone():
    clock = Clock()

    def fails(items):
        clock.now += 0.0005
        if POISON in items:
            raise SystemExit("poison")
        return items

    async with batching(fails, clock=clock, brief=lambda _: True) as batcher:
        await batcher.submit([1])
        (answer,) = await batcher.submit([POISON])
        assert isinstance(answer, SystemExit)
        assert await batcher.submit([2]) == [2]


async def test_each_caller_gets_its_own_answers():
    async with batching(Model()) as batcher:
        answers = await asyncio.gather(*(batcher.submit([n, n + 1]) for n in range(0, 40, 2)))
    assert answers == [[2 * n, 2 * n + 2] for n in range(0, 40, 2)]


async def test_callers_who_come_together_run_together_at_once_on_an_idle_model():
    model = Model()
    async with batching(model) as batcher:
        await asyncio.gather(*(batcher.submit([n]) for n in (1, 2, 3)))
    assert model.batches == [[1, 2, 3]]


async def test_what_came_while_the_model_was_busy_runs_when_it_is_free_though_the_batch_is_not_full():
    model = Model()
    async with batching(model) as batcher:
        async with busy(model, batcher):
            tasks = await waiting(batcher.submit([1]), batcher.submit([2]))
        await asyncio.gather(*tasks)
    assert model.batches == [[0], [1, 2]]


async def test_a_large_submission_is_split_over_batches_and_answered_once():
    model = Model()
    async with batching(model) as batcher:
        assert await batcher.submit(list(range(10))) == [2 * n for n in range(10)]
    assert [len(batch) for batch in model.batches] == [4, 4, 2]


async def test_the_earliest_deadline_runs_first():
    model = Model()
    async with batching(model, max_batch=1) as batcher:
        now = asyncio.get_running_loop().time()
        async with busy(model, batcher):
            tasks = await waiting(
                batcher.submit([1]), batcher.submit([2], now + 200), batcher.submit([3], now + 100), batcher.submit([4])
            )
        await asyncio.gather(*tasks)
    assert model.batches == [[0], [3], [2], [1], [4]]


async def test_who_has_waited_long_enough_goes_before_earlier_deadlines():
    model = Model()
    async with batching(model, max_batch=1, max_wait_seconds=0.0) as batcher:
        now = asyncio.get_running_loop().time()
        async with busy(model, batcher):
            tasks = await waiting(batcher.submit([1]), batcher.submit([2], now + 100))
        await asyncio.gather(*tasks)
    assert model.batches == [[0], [1], [2]]


async def test_what_expired_while_waiting_is_never_run():
    model, clock = Model(), Clock()
    async with batching(model, clock=clock) as batcher:
        async with busy(model, batcher):
            late, early = await waiting(batcher.submit([1], 50), batcher.submit([2], 500))
            clock.now = 100.0
        assert await early == [4]
        with pytest.raises(ExpiredError):
            await late
    assert model.batches == [[0], [2]]


async def test_a_cancelled_caller_is_not_run_and_its_neighbours_are():
    model = Model()
    async with batching(model) as batcher:
        async with busy(model, batcher):
            first, second, third = await waiting(batcher.submit([1]), batcher.submit([2]), batcher.submit([3]))
            second.cancel()
        assert (await first, await third) == ([2], [6])
    assert second.cancelled()
    assert model.batches == [[0], [1, 3]]


async def test_a_caller_cancelled_while_its_batch_runs_leaves_its_neighbours_their_answers():
    model = Model()
    async with batching(model) as batcher:
        model.hold()
        first, second = await waiting(batcher.submit([1]), batcher.submit([2]))
        await model.running()
        first.cancel()
        model.gate.set()
        assert await second == [4]
        assert await batcher.submit([5]) == [10]


async def test_only_the_poisonous_item_of_a_failed_batch_fails():
    async with batching(Model()) as batcher:
        (good,), (bad, fine), (other,) = await asyncio.gather(
            batcher.submit([1]), batcher.submit([POISON, 3]), batcher.submit([4])
        )
        assert (good, fine, other) == (2, 6, 8)
        assert isinstance(bad, RuntimeError)
        assert await batcher.submit([5]) == [10]


async def test_a_model_that_answers_too_few_fails_as_an_answer_error():
    async with batching(lambda items: []) as batcher:
        (answer,) = await batcher.submit([1])
    assert isinstance(answer, AnswerError)


async def test_a_model_that_wants_to_exit_fails_its_items_and_the_thread_goes_on():
    def model(items):
        if 1 in items:
            raise SystemExit(3)
        return items

    async with batching(model) as batcher:
        (answer,) = await batcher.submit([1])
        assert isinstance(answer, SystemExit)
        assert await batcher.submit([2]) == [2]


async def test_more_items_or_bytes_than_allowed_are_refused_at_once_and_room_comes_back():
    async with batching(Model(), max_pending_items=3, max_pending_bytes=100) as batcher:
        with batcher.admit(2, 90):
            with pytest.raises(OverloadedError, match="expected room for 2 more images, got 2 of at most 3") as caught:
                batcher.admit(2, 1).__enter__()
            assert caught.value.retry_after_seconds > 0
            assert caught.value.reason == "images"
            with pytest.raises(OverloadedError, match="expected room for 11 more bytes") as caught:
                batcher.admit(1, 11).__enter__()
            assert caught.value.reason == "bytes"
        assert batcher.pending_items == 0
        with batcher.admit(3, 100):
            assert batcher.pending_items == 3


async def ten_seconds_per_item(model, batcher, clock):
    async with busy(model, batcher):
        clock.now += 10.0


async def test_a_caller_whose_deadline_would_pass_before_it_is_run_is_refused():
    model, clock = Model(), Clock()
    async with batching(model, max_batch=1, clock=clock) as batcher:
        await ten_seconds_per_item(model, batcher, clock)
        async with busy(model, batcher):
            waiter, *_ = await waiting(batcher.submit([1], clock.now + 50))
            # 10 s for what runs, 10 s for what waits before it, 10 s for itself, and as much again to be sure.
            with pytest.raises(OverloadedError, match="the wait at present") as caught:
                batcher.admit(1, 1, clock.now + 59).__enter__()
            assert caught.value.reason == "deadline"
            # With an earlier deadline than the one that waits, only what runs goes before.
            with batcher.admit(1, 1, clock.now + 61), batcher.admit(1, 1, clock.now + 41), batcher.admit(1, 1, None):
                pass
        await waiter


async def test_on_an_idle_model_everybody_gets_a_chance_however_slow_it_was():
    model, clock = Model(), Clock()
    async with batching(model, clock=clock) as batcher:
        await ten_seconds_per_item(model, batcher, clock)
        with batcher.admit(1, 1, clock.now + 0.001):
            assert await batcher.submit([1], clock.now + 0.001) == [2]


async def test_what_would_be_too_late_even_now_makes_room_for_what_would_not():
    model, clock = Model(), Clock()
    async with batching(model, max_batch=1, clock=clock) as batcher:
        await ten_seconds_per_item(model, batcher, clock)
        async with busy(model, batcher):
            late, in_time = await waiting(batcher.submit([1], clock.now + 19), batcher.submit([2], clock.now + 100))
            clock.now += 10.0
        assert await in_time == [4]
        with pytest.raises(ExpiredError, match="would have passed"):
            await late
    assert model.batches == [[0], [0], [2]]


async def test_the_last_one_that_waits_gets_its_chance_though_it_may_be_too_late():
    model, clock = Model(), Clock()
    async with batching(model, max_batch=1, clock=clock) as batcher:
        await ten_seconds_per_item(model, batcher, clock)
        async with busy(model, batcher):
            (late,) = await waiting(batcher.submit([1], clock.now + 19))
            clock.now += 10.0
        assert await late == [2]


async def test_each_batch_is_told_with_its_waits_its_time_and_its_failures():
    model, clock, told = Model(), Clock(), []
    async with batching(model, clock=clock, on_batch=told.append) as batcher:
        async with busy(model, batcher):
            tasks = await waiting(batcher.submit([1, POISON]), batcher.submit([3]))
            assert batcher.running_seconds == 0.0
            clock.now += 2.0
            assert batcher.running_seconds == 2.0
        await asyncio.gather(*tasks)
        assert batcher.running_seconds == 0.0
    assert told == [BatchRun([0], [0.0], 2.0, 0), BatchRun([1, POISON, 3], [2.0, 2.0], 0.0, 1)]


async def test_closing_ends_what_waits_and_what_runs_and_refuses_what_comes():
    model = Model()
    async with batching(model) as batcher:
        model.hold()
        (running,) = await waiting(batcher.submit([0]))
        await model.running()
        (queued,) = await waiting(batcher.submit([1]))
        await batcher.close()
        for task in (running, queued):
            with pytest.raises(UnavailableError):
                await task
        with pytest.raises(UnavailableError):
            await batcher.submit([2])
        with pytest.raises(UnavailableError):
            batcher.admit(1, 1).__enter__()


class Doors:
    """Lets each batch out by itself, by its first item."""

    def __init__(self, *firsts):
        self.doors = {first: threading.Event() for first in firsts}
        self.came = {first: threading.Event() for first in firsts}

    def __call__(self, items):
        self.came[items[0]].set()
        self.doors[items[0]].wait(20)
        return [2 * item for item in items]

    async def has(self, first):
        assert await asyncio.to_thread(self.came[first].wait, 20)


async def test_as_many_batches_as_lanes_run_at_once_and_answers_keep_their_order():
    model = Doors(0, 4, 8)
    async with batching(model, lanes=2) as batcher:
        large = asyncio.create_task(batcher.submit(list(range(10))))
        await model.has(0)
        await model.has(4)
        assert not model.came[8].is_set()
        model.doors[4].set()  # the second batch is done first
        await model.has(8)
        model.doors[8].set()
        model.doors[0].set()

        assert await large == [2 * item for item in range(10)]


async def test_a_running_batch_is_told_how_long_it_is_wanted():
    told, clock = [], Clock()

    def model(items):
        told.append(seconds_wanted.get())
        return items

    class Held:
        """Runs nothing before it is let go."""

        def start(self, work, done):
            self.work = work

        def close(self):
            pass

    held = Held()
    async with batching(model, worker=held, clock=clock) as batcher:
        first, second = await waiting(batcher.submit([1], 5.0), batcher.submit([2], 9.0))
        await asyncio.sleep(0)
        await asyncio.to_thread(held.work)
        (wanted,) = told

        clock.now = 2.0
        assert wanted() == 7.0
        second.cancel()
        await asyncio.wait([second])
        assert wanted() == 3.0
        first.cancel()
        await asyncio.wait([first])
        assert wanted() < 0
