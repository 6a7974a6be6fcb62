import asyncio

import pytest

from service.errors import UnavailableError
from service.lifecycle import Lifecycle


def test_calls_are_refused_before_it_opens_and_after_it_closes():
    lifecycle = Lifecycle()
    with pytest.raises(UnavailableError, match="warming up"):
        lifecycle.call().__enter__()
    lifecycle.open()
    with lifecycle.call():
        lifecycle.close()
    with pytest.raises(UnavailableError, match="stopping"):
        lifecycle.call().__enter__()


async def test_it_is_idle_when_the_last_call_has_ended():
    lifecycle = Lifecycle()
    lifecycle.open()
    await lifecycle.idle()
    with lifecycle.call():
        with lifecycle.call():
            waiter = asyncio.create_task(lifecycle.idle())
        await asyncio.sleep(0)
        assert not waiter.done()
    await waiter
