import asyncio

import pytest

from pathguard.client import AsyncClient, InputError, RefusedError, TimedOutError, UnreachableError
from tests.service.fakes import LAYERS, image_of


async def test_the_async_client_does_the_same(target, tmp_path, nobody):
    async with AsyncClient(target) as client:
        missing, good = await client.detect([tmp_path / "missing.png", image_of(2)], include_path=True)
        assert missing.error is not None
        assert (good.score, list(good.path)) == (2.0, list(LAYERS))
        assert [model.name for model in await client.models()] == ["fake"]
        assert await client.ready()
        with pytest.raises(RefusedError):
            await client.detect([image_of(1)], model="other")
    async with AsyncClient(nobody) as client:
        assert not await client.ready(timeout_seconds=1.0)
        with pytest.raises(UnreachableError):
            await client.detect([image_of(1)])


async def test_a_stream_answers_every_image_once(target, tmp_path):
    values = [value % 200 for value in range(700)]
    async with AsyncClient(target) as client:
        images = [image_of(value) for value in values]
        answers = {position: result async for position, result in client.detect_stream([*images, tmp_path / "no.png"])}
    assert [answers[position].score for position in range(700)] == values
    assert answers[700].error.startswith("expected a file that can be read")


async def test_streams_side_by_side_do_not_disturb_each_other(target):
    async with AsyncClient(target) as client:

        async def scores(value):
            return {result.score async for _, result in client.detect_stream([image_of(value)] * 100)}

        assert await asyncio.gather(*(scores(value) for value in range(5))) == [{value} for value in range(5)]


async def test_a_stream_that_fails_says_why(target, detector, nobody):
    async with AsyncClient(target) as client:
        with pytest.raises(InputError, match="expected an image as bytes"):
            [_ async for _ in client.detect_stream(["photo.png"])]
        with pytest.raises(RefusedError, match="got 'other'"):
            [_ async for _ in client.detect_stream([image_of(1)], model="other")]
        detector.hold()
        with pytest.raises(TimedOutError):
            [_ async for _ in client.detect_stream([image_of(1)], timeout_seconds=0.1)]
        detector.gate.set()
    async with AsyncClient(nobody) as client:
        with pytest.raises(UnreachableError):
            [_ async for _ in client.detect_stream([image_of(1)])]
