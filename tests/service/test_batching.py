import asyncio
import threading
from contextlib import asynccontextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.batching import MicroBatcher
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


@asynccontextmanager
async def batching(model, *, max_batch=4, max_wait_seconds=60.0, max_pending_items=1000, max_pending_bytes=1000):
    batcher = MicroBatcher(
        model,
        max_batch=max_batch,
        max_wait_seconds=max_wait_seconds,
        max_pending_items=max_pending_items,
        max_pending_bytes=max_pending_bytes,
    )
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


async def test_what_expired_while_waiting_is_never_run(monkeypatch):
    model, loop = Model(), asyncio.get_running_loop()
    async with batching(model) as batcher:
        async with busy(model, batcher):
            now = loop.time()
            late, early = await waiting(batcher.submit([1], now + 50), batcher.submit([2], now + 500))
            monkeypatch.setattr(loop, "time", lambda: now + 100)
        assert await early == [4]
        with pytest.raises(ExpiredError):
            await late
        monkeypatch.undo()
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
            with pytest.raises(OverloadedError, match="expected room for 11 more bytes"):
                batcher.admit(1, 11).__enter__()
        assert batcher.pending_items == 0
        with batcher.admit(3, 100):
            assert batcher.pending_items == 3


async def test_a_caller_whose_deadline_would_pass_while_it_waits_is_refused(monkeypatch):
    model, loop = Model(), asyncio.get_running_loop()
    async with batching(model, max_batch=1) as batcher:
        async with busy(model, batcher):
            # The batch of one item takes 10 s by the loop's clock.
            started = loop.time()
            monkeypatch.setattr(loop, "time", lambda: started + 10)
        monkeypatch.setattr(loop, "time", lambda: started)
        async with busy(model, batcher):
            waiter, *_ = await waiting(batcher.submit([1], started + 30))
            with pytest.raises(OverloadedError, match="the wait at present"):
                batcher.admit(1, 1, started + 5).__enter__()
            with batcher.admit(1, 1, started + 1000), batcher.admit(1, 1, None):
                pass
        await waiter
        monkeypatch.undo()


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


# Items, seconds to the deadline or None, whether it is cancelled while the model is busy.
callers = st.lists(
    st.tuples(
        st.lists(st.integers(POISON, 9), min_size=1, max_size=9),
        st.none() | st.integers(100, 10_000),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(callers, st.integers(1, 5))
def test_every_future_ends_once_with_its_own_answers_in_batches_within_the_limit(callers, max_batch):
    async def scenario():
        model = Model()
        async with batching(model, max_batch=max_batch) as batcher:
            async with busy(model, batcher):
                now = asyncio.get_running_loop().time()
                tasks = await waiting(
                    *(batcher.submit(items, None if left is None else now + left) for items, left, _ in callers)
                )
                for task, (_, _, cancelled) in zip(tasks, callers, strict=True):
                    if cancelled:
                        task.cancel()
            return model.batches, await asyncio.gather(*tasks, return_exceptions=True)

    batches, outcomes = asyncio.run(scenario())

    assert all(1 <= len(batch) <= max_batch for batch in batches)
    for (items, _, cancelled), outcome in zip(callers, outcomes, strict=True):
        if cancelled:
            assert isinstance(outcome, asyncio.CancelledError)
            continue
        expected = ["failed" if item == POISON else 2 * item for item in items]
        assert ["failed" if isinstance(answer, RuntimeError) else answer for answer in outcome] == expected
