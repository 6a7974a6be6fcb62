import os
import subprocess
import sys

import pytest

from service.config import ServiceConfig
from service.errors import ConfigError
from service.processors import keep_to

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are not kept to processors")

# In a process of its own: what a thread may use is for good.
PROGRAM = """
import asyncio, os, threading
from service.model_thread import ModelThread
from service.processors import keep_to, roam
from service.threads import in_thread

async def main():
    everywhere = os.sched_getaffinity(0)
    keep_to(min(everywhere))
    assert os.sched_getaffinity(0) == {min(everywhere)}
    plain = []
    thread = threading.Thread(target=lambda: plain.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    assert plain == [{min(everywhere)}]
    assert await in_thread(lambda: os.sched_getaffinity(0), 10) == everywhere
    done = asyncio.get_running_loop().create_future()
    worker = ModelThread()
    worker.start(lambda: os.sched_getaffinity(0), done.set_result)
    assert await done == everywhere
    worker.close()

asyncio.run(main())
print("as it should be")
"""


@needs_affinity
def test_the_loop_and_its_threads_keep_to_one_processor_and_those_that_work_long_to_none():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.strip() == "as it should be", done.stderr


@needs_affinity
def test_a_processor_that_the_process_may_not_use_is_refused():
    with pytest.raises(ConfigError, match="^expected loop_cpu of .*, got 100000$"):
        keep_to(100_000)


def test_where_threads_cannot_be_kept_the_setting_is_refused(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(ConfigError, match="^expected no loop_cpu on a system"):
        keep_to(0)


def test_unless_it_is_asked_for_nothing_is_kept_anywhere():
    assert ServiceConfig().loop_cpu is None
