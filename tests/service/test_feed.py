import asyncio

import pytest

from service.feed import answer_all


class Source:
    """Gives the requests it is told to give, and remembers how many were taken."""

    def __init__(self, *requests, endless=False):
        self.requests = list(requests)
        self.endless = endless
        self.taken = 0

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        if self.taken == len(self.requests):
            if self.endless:
                await asyncio.Event().wait()
            raise StopAsyncIteration
        self.taken += 1
        return self.requests[self.taken - 1]


class Answers:
    """Answers twice the request when its gate is open; fails for negative ones."""

    def __init__(self, *held):
        self.gates = {request: asyncio.Event() for request in held}
        self.running = 0
        self.most = 0
        self.cancelled = 0

    async def __call__(self, request):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if request in self.gates:
                await self.gates[request].wait()
            await asyncio.sleep(0)
            if request < 0:
                raise ValueError(f"bad {request}")
            return 2 * request
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


async def never():
    return await asyncio.Event().wait()


def feed(source, answers, *, limit=10, size=lambda request: 1, end=never):
    return answer_all(source, answers, size=size, limit=limit, end=end)


async def turns(count=20):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_every_request_is_answered():
    assert sorted([answer async for answer in feed(Source(1, 2, 3), Answers())]) == [2, 4, 6]


async def test_no_request_gives_no_answer():
    assert [answer async for answer in feed(Source(), Answers())] == []


async def test_answers_come_as_they_are_ready():
    answers = Answers(1)
    responses = feed(Source(1, 2), answers)
    assert await anext(responses) == 4
    answers.gates[1].set()
    assert await anext(responses) == 2


async def test_no_more_than_the_limit_is_under_way():
    answers = Answers()
    assert len([answer async for answer in feed(Source(*range(50)), answers, limit=3)]) == 50
    assert answers.most <= 3


async def test_who_does_not_read_is_not_read_from():
    source = Source(*range(50))
    responses = feed(source, Answers(), limit=5)
    await anext(responses)
    await turns()
    # What is under way or ready counts until it is taken; one request more waits in the reader's hand.
    assert source.taken <= 7
    await responses.aclose()


async def test_a_request_larger_than_the_limit_runs_alone():
    answers = Answers()
    sizes = {1: 1, 2: 99, 3: 1}
    got = [answer async for answer in feed(Source(1, 2, 3), answers, limit=4, size=sizes.get)]
    assert (got, answers.most) == ([2, 4, 6], 1)


async def test_a_request_that_fails_ends_the_feed_after_the_others_are_answered():
    answers = Answers(1)
    source = Source(1, -5, endless=True)
    responses = feed(source, answers)
    first = asyncio.ensure_future(anext(responses))
    await turns()
    answers.gates[1].set()
    assert await first == 2
    with pytest.raises(ValueError, match="bad -5"):
        await anext(responses)


async def test_a_source_that_fails_ends_the_feed_likewise():
    class Broken(Source):
        async def __anext__(self):
            if self.taken == len(self.requests):
                raise OSError("connection lost")
            return await super().__anext__()

    responses = feed(Broken(1), Answers())
    assert await anext(responses) == 2
    with pytest.raises(OSError, match="connection lost"):
        await anext(responses)


async def test_the_end_stops_reading_and_lets_what_is_under_way_be_answered():
    over, answers = asyncio.Event(), Answers(1)

    async def end():
        await over.wait()
        return RuntimeError("stopping")

    responses = feed(Source(1, endless=True), answers, end=end)
    first = asyncio.ensure_future(anext(responses))
    await turns()
    over.set()
    await turns()
    assert not first.done()
    answers.gates[1].set()
    assert await first == 2
    with pytest.raises(RuntimeError, match="stopping"):
        await anext(responses)


async def test_a_caller_who_leaves_takes_all_its_requests_with_it():
    answers = Answers(1, 2)
    responses = feed(Source(1, 2, 3), answers)
    assert await anext(responses) == 6
    await responses.aclose()
    await turns()
    assert (answers.running, answers.cancelled) == (0, 2)
